-- How far into the tail each user is: N(u), the long-tail coefficient ln(N(u) + 1) (eq. 5 of
-- arXiv 2401.13870), and a bucket. The users in the order of (N(u), user_id) are cut into three
-- runs, tail, torso and head; where three does not divide them, the first runs get one more.
--
-- Inputs:  history: the interactions that count as known (user_id, ...)
-- Columns: user_id, interactions (int64), long_tail_coefficient (float64), bucket (string)
with counted as (
    select user_id, count(*) as interactions
    from history
    group by user_id
),
placed as (
    select
        user_id,
        interactions,
        row_number() over (order by interactions, user_id) as place,
        count(*) over () as users
    from counted
)
select
    user_id,
    interactions,
    ln(cast(interactions as double) + 1) as long_tail_coefficient,
    case
        when place <= (users + 2) / 3 then 'tail'
        when place <= (users + 2) / 3 + (users + 1) / 3 then 'torso'
        else 'head'
    end as bucket
from placed
order by user_id
