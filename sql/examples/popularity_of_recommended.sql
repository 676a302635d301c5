-- How popular is what is recommended, and did fusing move it? The mean number of train
-- interactions of the recommended items, beside those that the recommender alone would have put
-- there (its first k, as far as they are still in the list).
--
-- Tables: recommendations (published), parts.train (output of the stage `parts`)
with popularity as (
    select item_id, count(*) as interactions
    from parts.train
    group by item_id
)
select
    r.ds,
    r.bucket,
    avg(coalesce(p.interactions, 0)) as mean_popularity,
    avg(case when r.rank = 1 then coalesce(p.interactions, 0) end) as mean_popularity_first,
    avg(case when r.rec_rank = 1 then coalesce(p.interactions, 0) end) as mean_popularity_first_of_recommender
from recommendations as r
left join popularity as p on p.item_id = r.item_id
group by r.ds, r.bucket
order by r.ds, r.bucket
