//! Rows that say the same thing twice: exact duplicates and re-ratings of an interaction log,
//! second rows of an item in an item table. The last one stays.
//!
//! In: a normalised table on a store. Out: the row ids to leave out, found by DataFusion within
//! its memory limit, so that the log need not fit in memory.

use arrow::array::AsArray;
use arrow::datatypes::Int64Type;
use futures::TryStreamExt;

use crate::columns::{ITEM_ID, RATING, ROW_ID, TIMESTAMP, USER_ID};
use crate::error::Result;
use crate::tables::StoredTable;
use crate::tables::sql_errors::from_datafusion;
use crate::tables::sql_memory::SqlMemory;

/// What a repeated row repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// A (user, item) pair; the row with the largest (timestamp, row id) stays.
    UserAndItem,
    /// An item; the row with the largest row id stays.
    Item,
}

/// The rows to leave out.
#[derive(Debug, Default)]
pub(super) struct Repeats {
    /// Their row ids, ascending.
    pub(super) rows: Vec<i64>,
    /// How many of them equal the row that came after them in time, rating included.
    pub(super) exact: u64,
}

/// Finds the rows of `table` that a later one replaces.
pub(super) async fn find(table: &StoredTable, key: Key, memory: &SqlMemory) -> Result<Repeats> {
    let ctx = memory.session()?;
    ctx.register_table("log", table.provider()?).map_err(from_datafusion)?;
    let stream = ctx.sql(&query(table, key)).await.map_err(from_datafusion)?;
    let mut stream = stream.execute_stream().await.map_err(from_datafusion)?;
    let mut found = Repeats::default();
    while let Some(batch) = stream.try_next().await.map_err(from_datafusion)? {
        found.rows.extend_from_slice(batch.column(0).as_primitive::<Int64Type>().values());
        found.exact += batch.column(1).as_boolean().true_count() as u64;
    }
    found.rows.sort_unstable();
    Ok(found)
}

fn query(table: &StoredTable, key: Key) -> String {
    let has = |name: &str| table.schema().index_of(name).is_ok();
    let keys = match key {
        Key::UserAndItem => format!("{USER_ID}, {ITEM_ID}"),
        Key::Item => ITEM_ID.to_owned(),
    };
    let timed = key == Key::UserAndItem && has(TIMESTAMP);
    let order = match timed {
        true => format!("{TIMESTAMP} desc, {ROW_ID} desc"),
        false => format!("{ROW_ID} desc"),
    };
    let window = format!("over (partition by {keys} order by {order})");
    let compared = [(timed, TIMESTAMP), (key == Key::UserAndItem && has(RATING), RATING)];
    let equal: String = compared
        .iter()
        .filter(|(used, _)| *used)
        .map(|(_, c)| format!(" and ({c} is not distinct from (lag({c}) {window}))"))
        .collect();
    format!(
        "select {ROW_ID}, exact from (select {ROW_ID}, row_number() {window} as place, \
         true{equal} as exact from log) where place > 1"
    )
}
