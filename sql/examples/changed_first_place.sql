-- Where did the LLM change the first place? What is first now, and what the recommender had
-- first (empty where it fell out of the list altogether).
--
-- Tables: recommendations (published)
select
    now.ds,
    now.user_id,
    now.bucket,
    now.alpha,
    now.item_id,
    now.title,
    now.rec_rank,
    before.item_id as recommender_item_id,
    before.title as recommender_title,
    before.rank as its_rank_now
from recommendations as now
left join recommendations as before
    on before.ds = now.ds and before.user_id = now.user_id and before.rec_rank = 1
where now.rank = 1 and now.rec_rank > 1
order by now.ds, now.user_id
