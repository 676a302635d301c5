-- Share of the users of `users` who have a list. Give a `min`.
-- Null where `users` is empty.
select avg(case when r.user_id is null then 0.0 else 1.0 end) as value
from (select distinct user_id from users) u
left join (select distinct user_id from recommendations) r on u.user_id = r.user_id
