-- How much of the catalogue is recommended? Distinct items by day and bucket, and their share
-- of all items of the item table.
--
-- Tables: recommendations (published), items (source)
select
    r.ds,
    r.bucket,
    count(distinct r.item_id) as items,
    cast(count(distinct r.item_id) as double) / max(c.items) as share_of_catalogue
from recommendations as r
cross join (select count(*) as items from items) as c
group by r.ds, r.bucket
order by r.ds, r.bucket
