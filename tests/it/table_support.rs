//! What the tests of tables, queries and their stages share: stores in memory, Parquet files as
//! other writers make them, sources read, and rows as text.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::{Field, Schema};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use tailfuse::error::Result;
use tailfuse::query::{open_session, plan_query, register};
use tailfuse::stages::context::{Cancel, Observer};
use tailfuse::stages::{OutputTable, StageContext, StageInput, StageResult};
use tailfuse::tables::{SourceConfig, SourceReport, SourceTarget, SqlMemory, Store, StoredTable, Table, read_source};

/// An empty store in memory.
pub fn memory() -> Store {
    Store::open("memory:///", Path::new("/")).unwrap()
}

/// Parquet bytes with the columns' own types, `group_rows` rows a row group.
pub fn parquet_bytes(columns: Vec<(&str, ArrayRef)>, group_rows: usize) -> Vec<u8> {
    let fields: Vec<Field> = columns.iter().map(|(n, a)| Field::new(*n, a.data_type().clone(), true)).collect();
    let arrays = columns.into_iter().map(|(_, a)| a).collect();
    let batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays).unwrap();
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(group_rows)).build();
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    bytes
}

/// Puts a Parquet file as another program would write it.
pub async fn put_parquet(store: &Store, file: &str, columns: Vec<(&str, ArrayRef)>) {
    store.put(file, parquet_bytes(columns, 1 << 20).into()).await.unwrap();
}

/// Reads the source that lies in `store`; the tables go to another store in memory.
pub async fn read(store: &Store, config: &SourceConfig) -> Result<SourceReport> {
    let out = memory();
    let target = SourceTarget {
        store: &out,
        table_file: "table.parquet",
        bad_rows_file: "bad_rows.parquet",
        memory: SqlMemory::default(),
        tick: &|_| Ok(()),
    };
    read_source("log", config, store, &target).await
}

/// A source config with these mappings (ours, theirs).
pub fn config(columns: &[(&str, &str)]) -> SourceConfig {
    let columns = columns.iter().map(|(ours, theirs)| ((*ours).to_owned(), (*theirs).to_owned())).collect();
    SourceConfig { columns, ..SourceConfig::default() }
}

/// A table on a store of its own.
pub async fn stored(columns: Vec<(&str, ArrayRef)>) -> StoredTable {
    let columns = columns.into_iter().map(|(n, a)| (n, a, true)).collect();
    StoredTable::write(&memory(), "t.parquet", &Table::from_columns(columns).unwrap()).await.unwrap()
}

/// Rows as text, columns joined by `|`, nulls as `-`.
pub fn lines(batches: &[RecordBatch]) -> Vec<String> {
    let options = FormatOptions::default().with_null("-");
    let mut lines = Vec::new();
    for batch in batches {
        let columns: Vec<_> =
            batch.columns().iter().map(|c| ArrayFormatter::try_new(c.as_ref(), &options).unwrap()).collect();
        for row in 0..batch.num_rows() {
            let cells: Vec<String> = columns.iter().map(|c| c.value(row).to_string()).collect();
            lines.push(cells.join("|"));
        }
    }
    lines
}

/// The rows of a query over tables by name.
pub async fn query(tables: &[(&str, &StoredTable)], sql: &str) -> Result<Vec<String>> {
    let ctx = open_session(&SqlMemory::default())?;
    for (name, table) in tables {
        register(&ctx, name, table)?;
    }
    let frame = plan_query(&ctx, sql).await?;
    let batches = frame.collect().await.map_err(tailfuse::tables::sql_errors::from_datafusion)?;
    Ok(lines(&batches))
}

/// All rows of a stored table in their order.
pub async fn all(table: &StoredTable) -> Vec<String> {
    lines(table.collect().await.unwrap().batches())
}

struct Quiet;

impl Observer for Quiet {
    fn begin(&self, _unit: &str, _total: u64) {}
    fn advance(&self, _n: u64) {}
    fn note(&self, _text: &str) {}
}

/// A stage context with table inputs by slot.
pub fn stage_context(inputs: &[(&str, &StoredTable)]) -> StageContext {
    StageContext {
        name: "stage".into(),
        seed: 1,
        device: Default::default(),
        inputs: inputs.iter().map(|(slot, t)| ((*slot).to_owned(), StageInput::Table((*t).clone()))).collect(),
        models: BTreeMap::new(),
        savings: memory(),
        warehouse: memory(),
        publishing: Default::default(),
        run_id: "run".into(),
        memory_limit: 256 << 20,
        spill_dir: None,
        observer: Arc::new(Quiet),
        cancel: Cancel::default(),
    }
}

/// A stage's output, written as the executor does.
pub async fn output(result: StageResult, name: &str) -> Result<StoredTable> {
    let mut result = result;
    match result.tables.remove(name).expect("the output is there") {
        OutputTable::Memory(table) => StoredTable::write(&memory(), "out.parquet", &table).await,
        OutputTable::Stream(rows) => StoredTable::write_stream(&memory(), "out.parquet", rows).await,
    }
}
