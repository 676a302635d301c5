-- What changed between the last two days? The share of each user's list that stayed, and the
-- means of what may be compared between days: rec_score and alpha (score is not).
--
-- Tables: recommendations (published, two days at least)
with days as (
    select max(ds) as today, max(case when ds < (select max(ds) from recommendations) then ds end) as yesterday
    from recommendations
),
today as (
    select r.* from recommendations as r cross join days as d where r.ds = d.today
),
yesterday as (
    select r.* from recommendations as r cross join days as d where r.ds = d.yesterday
),
users as (
    select
        t.user_id,
        t.bucket,
        count(*) as places,
        count(y.item_id) as stayed,
        avg(t.rec_score) as rec_score,
        avg(t.alpha) as alpha
    from today as t
    left join yesterday as y on y.user_id = t.user_id and y.item_id = t.item_id
    group by t.user_id, t.bucket
),
before as (
    select user_id, avg(rec_score) as rec_score, avg(alpha) as alpha
    from yesterday
    group by user_id
)
select
    u.bucket,
    count(*) as users,
    avg(cast(u.stayed as double) / u.places) as share_of_list_that_stayed,
    avg(u.rec_score) - avg(b.rec_score) as change_of_rec_score,
    avg(u.alpha) - avg(b.alpha) as change_of_alpha
from users as u
join before as b on b.user_id = u.user_id
group by u.bucket
order by u.bucket
