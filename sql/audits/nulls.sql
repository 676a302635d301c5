-- Rows without a user, an item, a rank from 1 up, a score that is a number, or a source. Give `max = 0`.
with wrong as (
    select user_id, item_id, rank, score, source
    from recommendations
    where user_id is null or item_id is null or source is null
        or rank is null or rank < 1
        or score is null or isnan(score)
)
select (select count(*) from wrong) as value, user_id, item_id, rank, score, source
from wrong order by user_id, item_id limit 20
