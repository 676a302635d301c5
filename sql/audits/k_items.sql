-- Users whose list does not have $k items. Give a `max`; users who have seen nearly everything have fewer.
with wrong as (
    select user_id, count(*) as items from recommendations group by user_id having count(*) <> $k
)
select (select count(*) from wrong) as value, user_id, items from wrong order by user_id limit 20
