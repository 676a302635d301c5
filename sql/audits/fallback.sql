-- Share of the users for whom the LLM was asked and failed. Give a `max`.
select avg(failed) as value
from (
    select user_id, max(case when source = 'fallback' then 1.0 else 0.0 end) as failed
    from recommendations
    group by user_id
)
