-- Keeps the interactions whose item the item table knows, so that every candidate has a text.
--
-- Inputs:  interactions (user_id, item_id, row_id, ...), items (item_id, ...)
-- Columns: all of interactions, row_id among them (the rule for ties needs it)
select i.*
from interactions as i
where i.item_id in (select item_id from items)
order by i.row_id
