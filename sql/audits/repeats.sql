-- Items that a user is recommended more than once. Give `max = 0`.
with wrong as (
    select user_id, item_id, count(*) as times from recommendations group by user_id, item_id having count(*) > 1
)
select (select count(*) from wrong) as value, user_id, item_id, times from wrong order by user_id, item_id limit 20
