-- Recommended items that the user has an interaction with already. Give `max = 0`.
with wrong as (
    select r.user_id, r.item_id
    from recommendations r join (select distinct user_id, item_id from history) h
        on r.user_id = h.user_id and r.item_id = h.item_id
)
select (select count(*) from wrong) as value, user_id, item_id from wrong order by user_id, item_id limit 20
