-- Share of all recommendations that goes to the hundredth of the items that is recommended most. Items are those with an
-- interaction in `history`. Give a `max`.
with times as (select item_id, count(*) as n from recommendations group by item_id),
ranked as (select n, row_number() over (order by n desc, item_id) as place from times),
few as (select ceil(count(distinct item_id) / 100.0) as items from history)
select sum(case when place <= items then n else 0 end) / cast(sum(n) as double) as value
from ranked cross join few
