-- How often each item was interacted with, and its place by that.
--
-- Inputs:  input (user_id, item_id, ...)
-- Columns: item_id, interactions (int64), users (int64), share (float64, of all interactions),
--          popularity_rank (int64, 1 = most; ties by item_id)
select
    item_id,
    count(*) as interactions,
    count(distinct user_id) as users,
    cast(count(*) as double) / sum(count(*)) over () as share,
    row_number() over (order by count(*) desc, item_id) as popularity_rank
from input
group by item_id
order by popularity_rank
