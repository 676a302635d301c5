-- One row for each user and item: the latest by time, of equal times the last in the file.
-- The reader does the same to sources with the role `interactions`; this is for logs that are
-- put together afterwards.
--
-- Inputs:  input (user_id, item_id, timestamp, row_id, ...)
-- Columns: all of input
select *
from input
qualify row_number() over (partition by user_id, item_id order by timestamp desc, row_id desc) = 1
order by row_id
