-- Who is in the tail? Users, their history and the trust in the LLM, by bucket and day.
--
-- Tables: recommendations (published)
select
    ds,
    bucket,
    count(*) as users,
    min(interactions) as least_interactions,
    max(interactions) as most_interactions,
    avg(alpha) as mean_alpha,
    sum(case when source in ('fused', 'reused') then 1 else 0 end) as users_with_llm_order
from recommendations
where rank = 1
group by ds, bucket
order by ds, min(interactions), bucket
