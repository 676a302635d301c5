-- Items that the same users interacted with: for each item the 20 others with the largest cosine
-- between their sets of users. A pair counts from two common users on.
--
-- Inputs:  input (user_id, item_id, ...)
-- Columns: item_id, other_item_id, rank (int64), users (int64, of both), cosine (float64)
with pairs as (
    select distinct user_id, item_id
    from input
),
sizes as (
    select item_id, count(*) as users
    from pairs
    group by item_id
),
common as (
    select a.item_id as item_id, b.item_id as other_item_id, count(*) as users
    from pairs as a
    join pairs as b on a.user_id = b.user_id and a.item_id <> b.item_id
    group by a.item_id, b.item_id
    having count(*) >= 2
),
scored as (
    select
        c.item_id,
        c.other_item_id,
        c.users,
        c.users / sqrt(cast(x.users as double) * cast(y.users as double)) as cosine
    from common as c
    join sizes as x on x.item_id = c.item_id
    join sizes as y on y.item_id = c.other_item_id
),
placed as (
    select
        item_id,
        other_item_id,
        row_number() over (partition by item_id order by cosine desc, other_item_id) as rank,
        users,
        cosine
    from scored
)
select item_id, other_item_id, rank, users, cosine
from placed
where rank <= 20
order by item_id, rank
