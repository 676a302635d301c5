-- Held-out interactions that were trained on: pairs of `test` that are in `train` too. Give `max = 0`.
with wrong as (
    select distinct t.user_id, t.item_id
    from test t join train l on t.user_id = l.user_id and t.item_id = l.item_id
)
select (select count(*) from wrong) as value, user_id, item_id from wrong order by user_id, item_id limit 20
