//! `top_similar('table', n)`: for every row of an embedding table its n nearest others.
//!
//! In: the name of a table with a column `embedding` (lists of numbers of one length) and an id:
//! `user_id`, `item_id`, or else its first other column. Out: rows (id, `neighbour_id`, `rank`
//! from 1, `similarity`), id after id in the order of the table, best neighbour first.
//!
//! The table is read when the query runs. All its embeddings are held in float32 (256 MiB for 1
//! million rows of 64) and are charged to the session's memory limit; neighbours stream out, so a
//! `limit` stops the work early. A filter on the id (`where user_id = 7`) chooses the query rows
//! before anything is multiplied.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, Int32Array, RecordBatch, UInt32Array};
use arrow::compute::{cast, concat, take};
use arrow::datatypes::{DataType, Field, Float32Type, Schema, SchemaRef};
use async_trait::async_trait;
use datafusion::catalog::{Session, TableFunctionArgs, TableFunctionImpl, TableProvider};
use datafusion::common::TableReference;
use datafusion::common::{DFSchema, DataFusionError, Result, ScalarValue, plan_err};
use datafusion::datasource::TableType;
use datafusion::execution::memory_pool::{MemoryConsumer, MemoryReservation};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::utils::conjunction;
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::stream::RecordBatchReceiverStreamBuilder;
use datafusion::physical_plan::streaming::{PartitionStream, StreamingTableExec};
use futures::{FutureExt, StreamExt};

use crate::columns::{EMBEDDING, ITEM_ID, NEIGHBOUR_ID, RANK, SIMILARITY, USER_ID};
use crate::query::neighbours::{Embeddings, Neighbour};
use crate::tables::parquet::plain_type;
use crate::tables::sql_errors::into_datafusion;

/// The function's name in SQL.
pub const TOP_SIMILAR: &str = "top_similar";
/// More neighbours than this are no neighbourhood, and each costs memory for every query.
const MOST_NEIGHBOURS: i64 = 1000;

/// The table function.
#[derive(Debug)]
pub struct TopSimilar;

impl TableFunctionImpl for TopSimilar {
    fn call_with_args(&self, args: TableFunctionArgs) -> Result<Arc<dyn TableProvider>> {
        let (name, n) = match args.exprs() {
            [Expr::Literal(name, _), Expr::Literal(n, _)] => (text(name), number(n)),
            _ => (None, None),
        };
        let (Some(name), Some(n)) = (name, n) else {
            return plan_err!("{TOP_SIMILAR} takes the name of a table and a number: {TOP_SIMILAR}('users', 5)");
        };
        if !(1..=MOST_NEIGHBOURS).contains(&n) {
            return plan_err!("{TOP_SIMILAR}: the number of neighbours is {n}, it must be 1 to {MOST_NEIGHBOURS}");
        }
        let table = find(args.session(), name)?;
        Ok(Arc::new(TopSimilarTable::new(name, table, n as usize)?))
    }
}

fn text(value: &ScalarValue) -> Option<&str> {
    value.try_as_str().flatten()
}

fn number(value: &ScalarValue) -> Option<i64> {
    match value.cast_to(&DataType::Int64).ok()? {
        ScalarValue::Int64(n) if value.data_type().is_integer() => n,
        _ => None,
    }
}

/// The table that `name` stands for, as in a query: `users`, `lightgcn.users`, `"Users"`.
fn find(session: &dyn Session, name: &str) -> Result<Arc<dyn TableProvider>> {
    let defaults = &session.config_options().catalog;
    let reference = TableReference::parse_str(name).resolve(&defaults.default_catalog, &defaults.default_schema);
    let catalogs = session.catalog_list();
    let schema = catalogs.catalog(&reference.catalog).and_then(|c| c.schema(&reference.schema));
    // Planning a table function is synchronous, and looking a table up is not, in general; in
    // the catalogues of a session, which are in memory, it is done at once.
    let found = schema.map(|s| s.table(&reference.table).now_or_never());
    match found {
        Some(Some(Ok(Some(table)))) => Ok(table),
        Some(Some(Err(e))) => Err(e),
        _ => plan_err!("{TOP_SIMILAR}: table '{name}' not found"),
    }
}

#[derive(Debug)]
struct TopSimilarTable {
    source: Arc<dyn TableProvider>,
    id: usize,
    embedding: usize,
    n: usize,
    schema: SchemaRef,
}

impl TopSimilarTable {
    fn new(name: &str, source: Arc<dyn TableProvider>, n: usize) -> Result<Self> {
        let columns = source.schema();
        let Ok(embedding) = columns.index_of(EMBEDDING) else {
            return plan_err!("{TOP_SIMILAR}: table '{name}' has no column {EMBEDDING}");
        };
        match columns.field(embedding).data_type() {
            DataType::List(f) | DataType::LargeList(f) | DataType::FixedSizeList(f, _)
                if f.data_type().is_numeric() => {}
            other => {
                return plan_err!("{TOP_SIMILAR}: column {EMBEDDING} of '{name}' is {other}, not a list of numbers");
            }
        }
        let named = |wanted: &str| columns.index_of(wanted).ok();
        let first_other = (0..columns.fields().len()).find(|i| *i != embedding);
        let Some(id) = named(USER_ID).or_else(|| named(ITEM_ID)).or(first_other) else {
            return plan_err!("{TOP_SIMILAR}: table '{name}' has no id beside the column {EMBEDDING}");
        };
        let id_field = columns.field(id);
        let id_type = plain_type(id_field.data_type());
        let schema = Arc::new(Schema::new(vec![
            Field::new(id_field.name(), id_type.clone(), id_field.is_nullable()),
            Field::new(NEIGHBOUR_ID, id_type, id_field.is_nullable()),
            Field::new(RANK, DataType::Int32, false),
            Field::new(SIMILARITY, DataType::Float64, false),
        ]));
        Ok(TopSimilarTable { source, id, embedding, n, schema })
    }

    fn id_schema(&self) -> SchemaRef {
        Arc::new(Schema::new(vec![self.schema.field(0).clone()]))
    }
}

#[async_trait]
impl TableProvider for TopSimilarTable {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn table_type(&self) -> TableType {
        TableType::Temporary
    }

    fn supports_filters_pushdown(&self, filters: &[&Expr]) -> Result<Vec<TableProviderFilterPushDown>> {
        let id = self.schema.field(0).name();
        let on_id = |filter: &&Expr| {
            let columns = filter.column_refs();
            !columns.is_empty() && columns.iter().all(|c| &c.name == id) && !filter.is_volatile()
        };
        let pushed = |filter: &&Expr| match on_id(filter) {
            true => TableProviderFilterPushDown::Exact,
            false => TableProviderFilterPushDown::Unsupported,
        };
        Ok(filters.iter().map(pushed).collect())
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let mut read = vec![self.id, self.embedding];
        read.sort_unstable();
        // Not optimised any further, so a file stays one partition and its rows in their order.
        let source = self.source.scan(state, Some(&read), &[], None).await?;
        let chosen = match conjunction(filters.iter().cloned()) {
            Some(filter) => {
                let columns = DFSchema::try_from(self.id_schema().as_ref().clone())?;
                Some(state.create_physical_expr(filter, &columns)?)
            }
            None => None,
        };
        let search = Search {
            source,
            // Where the id went when the two columns were sorted.
            id: usize::from(self.id > self.embedding),
            chosen,
            n: self.n,
            schema: self.schema.clone(),
            id_schema: self.id_schema(),
        };
        let exec =
            StreamingTableExec::try_new(self.schema.clone(), vec![Arc::new(search)], projection, [], false, limit)?;
        Ok(Arc::new(exec))
    }
}

/// The search, ready to run.
#[derive(Clone, Debug)]
struct Search {
    source: Arc<dyn ExecutionPlan>,
    id: usize,
    chosen: Option<Arc<dyn PhysicalExpr>>,
    n: usize,
    schema: SchemaRef,
    id_schema: SchemaRef,
}

impl PartitionStream for Search {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, ctx: Arc<TaskContext>) -> SendableRecordBatchStream {
        let mut stream = RecordBatchReceiverStreamBuilder::new(self.schema.clone(), 2);
        let out = stream.tx();
        let search = self.clone();
        stream.spawn(async move {
            let loaded = search.load(&ctx).await?;
            let work = tokio::task::spawn_blocking(move || {
                let Loaded { ids, embeddings, queries, reservation } = loaded;
                for queries in queries.chunks(Embeddings::chunk()) {
                    let found = embeddings.nearest(queries, search.n);
                    let batch = search.batch(&ids, queries, &found)?;
                    // Nobody listens any more: a limit was reached, or the query was dropped.
                    if out.blocking_send(Ok(batch)).is_err() {
                        break;
                    }
                }
                drop(reservation);
                Ok(())
            });
            work.await.map_err(|e| DataFusionError::ExecutionJoin(Box::new(e)))?
        });
        stream.build()
    }
}

/// The table in memory.
struct Loaded {
    ids: ArrayRef,
    embeddings: Embeddings,
    queries: Vec<u32>,
    reservation: MemoryReservation,
}

impl Search {
    async fn load(&self, ctx: &Arc<TaskContext>) -> Result<Loaded> {
        let reservation = MemoryConsumer::new(TOP_SIMILAR).register(ctx.memory_pool());
        let mut ids: Vec<ArrayRef> = Vec::new();
        let mut embeddings: Option<(usize, Embeddings)> = None;
        let mut queries: Vec<u32> = Vec::new();
        let mut first = 0usize;
        for partition in 0..self.source.properties().output_partitioning().partition_count() {
            let mut rows = self.source.execute(partition, ctx.clone())?;
            while let Some(batch) = rows.next().await {
                let batch = batch?;
                let id = cast(batch.column(self.id), self.id_schema.field(0).data_type())?;
                let lists = Lists::new(batch.column(1 - self.id))?;
                let dim = match &embeddings {
                    Some((dim, _)) => *dim,
                    None => lists.first_length().unwrap_or(0),
                };
                if embeddings.is_none() && lists.first_length().is_some() {
                    reservation.try_grow(Embeddings::scratch_bytes(dim))?;
                    let mut fresh = Embeddings::with_capacity(dim, 0);
                    // Rows before the first one that has an embedding.
                    for _ in 0..first {
                        fresh.push(None).map_err(into_datafusion)?;
                    }
                    embeddings = Some((dim, fresh));
                }
                // A growing vector holds up to twice its content while it moves.
                reservation
                    .try_grow(id.get_array_memory_size() + 2 * batch.num_rows() * (dim + 1) * size_of::<f32>())?;
                if let Some((_, embeddings)) = &mut embeddings {
                    for row in 0..batch.num_rows() {
                        embeddings.push(lists.row(row)).map_err(into_datafusion)?;
                    }
                }
                self.choose(&id, first, &mut queries)?;
                first += batch.num_rows();
                if u32::try_from(first).is_err() {
                    return Err(DataFusionError::Execution(format!("{TOP_SIMILAR}: more than {} rows", u32::MAX)));
                }
                ids.push(id);
            }
        }
        let ids: ArrayRef = match ids.as_slice() {
            [] => arrow::array::new_empty_array(self.id_schema.field(0).data_type()),
            parts => concat(&parts.iter().map(|a| a.as_ref()).collect::<Vec<_>>())?,
        };
        let mut embeddings = match embeddings {
            Some((_, embeddings)) => embeddings,
            // No row has an embedding, so no row has a neighbour.
            None => {
                queries.clear();
                Embeddings::with_capacity(1, 0)
            }
        };
        embeddings.finish();
        Ok(Loaded { ids, embeddings, queries, reservation })
    }

    /// Appends the rows of a batch whose neighbours are asked for.
    fn choose(&self, id: &ArrayRef, first: usize, queries: &mut Vec<u32>) -> Result<()> {
        let rows = first as u32..(first + id.len()) as u32;
        match &self.chosen {
            None => queries.extend(rows),
            Some(filter) => {
                let batch = RecordBatch::try_new(self.id_schema.clone(), vec![id.clone()])?;
                let keep = filter.evaluate(&batch)?.into_array(id.len())?;
                let keep = keep.as_boolean();
                queries.extend(rows.zip(keep.iter()).filter(|(_, k)| *k == Some(true)).map(|(r, _)| r));
            }
        }
        Ok(())
    }

    fn batch(&self, ids: &ArrayRef, queries: &[u32], found: &[Vec<Neighbour>]) -> Result<RecordBatch> {
        let pairs =
            || queries.iter().zip(found).flat_map(|(q, found)| found.iter().zip(1i32..).map(move |(f, r)| (*q, *f, r)));
        let own = UInt32Array::from_iter_values(pairs().map(|(q, ..)| q));
        let other = UInt32Array::from_iter_values(pairs().map(|(_, f, _)| f.0));
        let rank = Int32Array::from_iter_values(pairs().map(|(.., r)| r));
        let similarity = Float64Array::from_iter_values(pairs().map(|(_, f, _)| f.1));
        let columns: Vec<ArrayRef> =
            vec![take(ids, &own, None)?, take(ids, &other, None)?, Arc::new(rank), Arc::new(similarity)];
        Ok(RecordBatch::try_new(self.schema.clone(), columns)?)
    }
}

/// A column of lists as slices of float32.
struct Lists {
    offsets: Vec<usize>,
    values: Vec<f32>,
    missing: Vec<bool>,
}

impl Lists {
    fn new(column: &ArrayRef) -> Result<Self> {
        let to = DataType::LargeList(Arc::new(Field::new_list_field(DataType::Float32, true)));
        let lists = cast(column, &to)?;
        let lists = lists.as_list::<i64>();
        let offsets: Vec<usize> = lists.value_offsets().iter().map(|o| *o as usize).collect();
        let values = lists.values().as_primitive::<Float32Type>();
        // A null inside a list leaves it without a direction, as in `cosine_similarity`.
        let missing = (0..lists.len())
            .map(|r| lists.is_null(r) || (offsets[r]..offsets[r + 1]).any(|i| values.is_null(i)))
            .collect();
        Ok(Lists { offsets, values: values.values().to_vec(), missing })
    }

    fn row(&self, row: usize) -> Option<&[f32]> {
        (!self.missing[row]).then(|| &self.values[self.offsets[row]..self.offsets[row + 1]])
    }

    fn first_length(&self) -> Option<usize> {
        (0..self.missing.len()).find_map(|r| self.row(r)).map(<[f32]>::len)
    }
}
