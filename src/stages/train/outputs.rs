//! What a fit gives back: the model's files, its embeddings as tables, the training log.
//!
//! In: [`Fitted`] and the ids. Out: tables and an artifact.

use std::sync::Arc;

use arrow::array::{Float32Array, Float64Array, Int32Array, ListArray, RecordBatch};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};

use super::data::{FitOn, TrainData};
use super::fit::{Fitted, FittedModel, valid_column};
use crate::columns::EMBEDDING;
use crate::error::Result;
use crate::interactions::IdMap;
use crate::recommenders::saved::{ModelCard, TrainedModel, TrainedRater};
use crate::recommenders::{Backbone, Embeddings, Epoch, Task};
use crate::stages::context::Artifact;
use crate::tables::Table;

/// Rows of a batch of an embedding table.
pub(super) const BATCH_ROWS: usize = 1 << 16;

/// Schema of the training log.
pub(in crate::stages) fn epochs_schema(task: Task) -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("epoch", DataType::Int32, false),
        Field::new("loss", DataType::Float64, false),
        Field::new(valid_column(task), DataType::Float64, true),
        Field::new("seconds", DataType::Float64, false),
    ]))
}

/// The training log as a table.
pub(in crate::stages) fn epochs_table(task: Task, sign: f64, log: &[Epoch]) -> Result<Table> {
    Table::from_columns(vec![
        ("epoch", Arc::new(Int32Array::from_iter_values(log.iter().map(|e| e.number as i32))), false),
        ("loss", Arc::new(Float64Array::from_iter_values(log.iter().map(|e| e.loss))), false),
        (valid_column(task), Arc::new(log.iter().map(|e| e.valid.map(|v| v * sign)).collect::<Float64Array>()), true),
        ("seconds", Arc::new(Float64Array::from_iter_values(log.iter().map(|e| e.seconds))), false),
    ])
}

/// What a model's card says besides its data.
pub(super) struct Model<'a> {
    pub backbone: &'static Backbone,
    /// In full.
    pub hyper: &'a serde_json::Value,
    pub seed: u64,
    /// The validation metric of the best epoch.
    pub valid: Option<f64>,
    /// Of a rating model's multi-valued columns.
    pub separator: Option<String>,
}

impl Model<'_> {
    /// The files of a model.
    pub fn files(self, data: TrainData, fitted: Fitted) -> Result<Artifact> {
        let mut card = ModelCard::new(self.backbone.name, self.hyper.clone(), data.users.len(), data.items.len());
        card.best_epoch = fitted.best_epoch;
        card.seed = self.seed;
        card.weights_fit_on = fitted.fit_on.as_str().to_owned();
        card.data_sha256 = data.fingerprint(fitted.fit_on);
        card.metrics.extend(self.valid.map(|value| (valid_column(self.backbone.task).to_owned(), value)));
        card.separator = self.separator;
        let (users, items) = (data.users, data.items);
        let files = match fitted.model {
            FittedModel::Scorer(scorer) => TrainedModel { card, users, items, scorer }.to_files()?,
            FittedModel::Predictor(predictor) => TrainedRater { card, users, items, predictor }.to_files()?,
        };
        Ok(Artifact { files })
    }
}

/// What the weights that a card describes were fitted on.
pub(in crate::stages) fn fit_on_of(card: &ModelCard) -> FitOn {
    match card.weights_fit_on == FitOn::TrainAndValid.as_str() {
        true => FitOn::TrainAndValid,
        false => FitOn::Train,
    }
}

/// A list of float32, `[dim]`, as [`EMBEDDING`] promises.
fn vector_field() -> Arc<Field> {
    Arc::new(Field::new_list_field(DataType::Float32, true))
}

/// Schema of an embedding table.
pub(in crate::stages) fn embedding_schema(id: &str, id_type: DataType) -> SchemaRef {
    let fields = vec![Field::new(id, id_type, false), Field::new(EMBEDDING, DataType::List(vector_field()), false)];
    Arc::new(Schema::new(fields))
}

/// The type of an id column in our own tables, see [`crate::tables::ids`].
pub(in crate::stages) fn id_type(of: &DataType) -> DataType {
    match of.is_integer() {
        true => DataType::Int64,
        false => DataType::Utf8,
    }
}

/// An embedding table, one row per id.
pub(in crate::stages) fn embedding_table(id: &str, ids: &IdMap, rows: Embeddings<'_>) -> Result<Table> {
    let schema = embedding_schema(id, ids.ids().data_type());
    // A list column counts its values in 32 bits, so a large table takes several batches.
    let all: Vec<usize> = (0..ids.len()).collect();
    let batches = all.chunks(BATCH_ROWS).map(|chunk| {
        let (first, n) = (chunk[0], chunk.len());
        let values = rows.values[first * rows.dim..][..n * rows.dim].to_vec();
        let offsets = OffsetBuffer::from_lengths(std::iter::repeat_n(rows.dim, n));
        let vectors = ListArray::try_new(vector_field(), offsets, Arc::new(Float32Array::from(values)), None)?;
        let ids = ids.ids().take(first..first + n).to_array();
        Ok(RecordBatch::try_new(schema.clone(), vec![ids, Arc::new(vectors)])?)
    });
    let batches = batches.collect::<Result<Vec<_>>>()?;
    Ok(Table::new(schema, batches))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::columns::USER_ID;
    use crate::tables::IdColumn;
    use arrow::array::AsArray;
    use arrow::datatypes::Float32Type;

    #[test]
    fn an_embedding_table_may_have_several_batches() {
        let n = BATCH_ROWS + 5;
        let ids = IdMap::new(&[&IdColumn::Int((0..n as i64).collect())]).unwrap();
        let values: Vec<f32> = (0..n * 2).map(|v| v as f32).collect();
        let table = embedding_table(USER_ID, &ids, Embeddings { dim: 2, values: &values }).unwrap();
        assert_eq!((table.num_rows(), table.batches().len()), (n, 2));
        let last = table.batches()[1].column(1).as_list::<i32>().value(4);
        assert_eq!(last.as_primitive::<Float32Type>().values(), &values[2 * (n - 1)..]);
    }
}
