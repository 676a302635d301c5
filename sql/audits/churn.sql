-- How alike tonight's lists and those of the partition before are: the mean, over the users in both, of the Jaccard
-- overlap of their items. 1: nothing changed. A `min` finds a model that was thrown over, a `max` one that stands still.
with tonight as (select distinct user_id, item_id from recommendations),
before as (select distinct user_id, item_id from previous),
tonight_sizes as (select user_id, count(*) as n from tonight group by user_id),
before_sizes as (select user_id, count(*) as n from before group by user_id),
shared as (
    select t.user_id, count(*) as n
    from tonight t join before b on t.user_id = b.user_id and t.item_id = b.item_id
    group by t.user_id
)
select avg(coalesce(s.n, 0) / cast(t.n + b.n - coalesce(s.n, 0) as double)) as value
from tonight_sizes t
join before_sizes b on t.user_id = b.user_id
left join shared s on t.user_id = s.user_id
