-- Known interactions from $until (in the unit of `timestamp`) on, which the night could not know. Give `max = 0`.
with wrong as (
    select user_id, item_id, timestamp from history where timestamp >= $until
)
select (select count(*) from wrong) as value, user_id, item_id, timestamp
from wrong order by user_id, item_id limit 20
