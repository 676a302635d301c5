-- Gini coefficient of how often each item with an interaction in `history` is recommended: 0 where all are alike, near 1
-- where a few get everything. Give a `max`.
with times as (
    select i.item_id, coalesce(r.n, 0) as n
    from (select distinct item_id from history) i
    left join (select item_id, count(*) as n from recommendations group by item_id) r on i.item_id = r.item_id
),
ranked as (select n, row_number() over (order by n, item_id) as place from times)
select 2.0 * sum(place * n) / (count(*) * sum(n)) - (count(*) + 1.0) / count(*) as value
from ranked
