//! `train`: fits a recommender on train interactions.
//!
//! In: interactions (`user_id`, `item_id`, oldest first within a user), perhaps held-out ones for early
//! stopping, perhaps tables of all users and items. Out: artifact `model`
//! ([`crate::recommenders::saved`]), its embeddings as tables, the training log.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Float32Array, Float64Array, Int32Array, ListArray, RecordBatch};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::context::{
    Artifact, Cancel, InputSlot, Observer, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What,
};
use super::registry::StageKind;
use crate::columns::{EMBEDDING, ITEM_ID, USER_ID};
use crate::device::DeviceChoice;
use crate::error::{Error, Result};
use crate::interactions::{Histories, IdMap};
use crate::recommenders::saved::{ModelCard, TrainedModel};
use crate::recommenders::{Embeddings, Epoch, Fit, FitContext, Interactions, Recommender, Watch, registry};
use crate::tables::{IdColumn, Table};

/// `kind = "train"`.
pub const KIND: StageKind = StageKind {
    name: "train",
    version: 1,
    about: "Fits a recommender (`mf`, `lightgcn`) on train interactions, stopping early on validation.",
    sample: r#"model = "lightgcn"
train = "parts.train"
valid = "parts.valid"
hyper = { layers = 3, embedding_dim = 64 }
"#,
    schema: || schemars::schema_for!(TrainConfig),
    resolve,
};

/// Fits a recommender on train interactions.
///
/// Counters: `users`, `items`, `interactions` (distinct pairs), `epochs`, `best_epoch`, `valid_ndcg_10` (of the best epoch; null
/// without `valid`), `valid_users`, `valid_cold` (held-out rows of users without train interactions, not measured), `seconds_per_epoch` (median,
/// without validation), `weights_fit_on`, `device`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// The recommender: `mf` (matrix factorisation with the BPR loss) or `lightgcn`.
    pub model: String,
    /// Interactions to learn from: `user_id`, `item_id`. Repeated pairs count once.
    pub train: String,
    /// Held-out interactions, `user_id` and `item_id`: NDCG@10 on them (all items but the user's train
    /// items ranked) decides which epoch's weights are kept and when training stops. Without it
    /// exactly `hyper.epochs` epochs are run and the last weights kept. They are never trained on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid: Option<String>,
    /// A table whose `item_id` column lists all items, so that items without train interactions are
    /// known too. Left out, it is `X.items` where `train` is `X.train` (the outputs of a `split` stage);
    /// with `""`, or where `train` has another name, the items of `train` and `valid` are all there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub items: Option<String>,
    /// The same for users, `user_id`: left out, it is `X.users` where `train` is `X.train`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<String>,
    /// Hyper-parameters of the model; what is not given has its default.
    /// Both: `embedding_dim` (64), `learning_rate`, `l2`, `batch_size` (2048), `epochs` (at most; 200),
    /// `eval_every` (epochs, 2), `patience` (validations without a gain, 10). `lightgcn` also: `layers` (3).
    #[serde(default)]
    pub hyper: Map<String, Value>,
}

fn resolve(value: Value, _: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let mut config: TrainConfig =
        serde_json::from_value(value).map_err(|e| Error::spec("the config of `train` is wrong").because(e))?;
    let recommender = registry::find(&config.model)?.recommender(&Value::Object(config.hyper.clone()))?;
    if let Value::Object(full) = recommender.hyper() {
        config.hyper = full;
    }
    let beside = |name: &str| config.train.strip_suffix(".train").map(|stage| format!("{stage}.{name}"));
    let (items, users) = (beside("items"), beside("users"));
    // From here on: a reference, or `None` for the ids of `train` and `valid`.
    config.items = config.items.or(items).filter(|r| !r.is_empty());
    config.users = config.users.or(users).filter(|r| !r.is_empty());
    Ok(Box::new(Train { config, recommender: recommender.into() }))
}

/// Rows of a batch of an embedding table.
const BATCH_ROWS: usize = 1 << 16;

struct Train {
    config: TrainConfig,
    recommender: Arc<dyn Recommender>,
}

fn epochs_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("epoch", DataType::Int32, false),
        Field::new("loss", DataType::Float64, false),
        Field::new("valid_ndcg_10", DataType::Float64, true),
        Field::new("seconds", DataType::Float64, false),
    ]))
}

#[async_trait]
impl Stage for Train {
    fn inputs(&self) -> Vec<InputSlot> {
        let c = &self.config;
        let mut slots = vec![InputSlot::table("train", &c.train, &[USER_ID, ITEM_ID])];
        slots.extend(c.valid.as_ref().map(|r| InputSlot::table("valid", r, &[USER_ID, ITEM_ID])));
        slots.extend(c.items.as_ref().map(|r| InputSlot::table("items", r, &[ITEM_ID])));
        slots.extend(c.users.as_ref().map(|r| InputSlot::table("users", r, &[USER_ID])));
        slots
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        let table = |name, about| OutputSlot { name, what: What::Table, about };
        vec![
            OutputSlot {
                name: "model",
                what: What::Artifact,
                about: "The fitted model: `model.safetensors` (weights, ids) and `model.json`.",
            },
            table("user_embeddings", "`user_id` and `embedding`, one row per user, sorted by user."),
            table("item_embeddings", "`item_id` and `embedding`, one row per item, sorted by item."),
            table("epochs", "The training log: `epoch`, `loss`, `valid_ndcg_10`, `seconds`."),
        ]
    }

    fn identity(&self) -> Value {
        json!(self.config)
    }

    async fn plan_schemas(&self, inputs: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        let mut schemas = BTreeMap::from([("epochs".to_owned(), epochs_schema())]);
        for (output, id) in [("user_embeddings", USER_ID), ("item_embeddings", ITEM_ID)] {
            if let Some(Ok(field)) = inputs.get("train").map(|train| train.field_with_name(id)) {
                schemas.insert(output.to_owned(), embedding_schema(id, id_type(field.data_type())));
            }
        }
        Ok(schemas)
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        let train = ctx.collect("train").await?;
        let valid = ctx.collect_opt("valid").await?;
        let items = ctx.collect_opt("items").await?;
        let users = ctx.collect_opt("users").await?;
        let work = Work {
            model: self.config.model.clone(),
            recommender: self.recommender.clone(),
            device: ctx.device,
            seed: ctx.seed,
            progress: Progress { observer: ctx.observer.clone(), cancel: ctx.cancel.clone() },
        };
        tokio::task::spawn_blocking(move || work.run(&train, valid.as_ref(), items.as_ref(), users.as_ref())).await?
    }
}

/// What goes to the worker thread.
struct Work {
    model: String,
    recommender: Arc<dyn Recommender>,
    device: DeviceChoice,
    seed: u64,
    progress: Progress,
}

struct Progress {
    observer: Arc<dyn Observer>,
    cancel: Cancel,
}

impl Watch for Progress {
    fn begin(&self, epochs: usize) {
        self.observer.begin("epochs", epochs as u64);
    }
    fn epoch(&self, _: &Epoch) {
        self.observer.advance(1);
    }
    fn check(&self) -> Result<()> {
        self.cancel.check()
    }
}

impl Work {
    fn run(
        &self,
        train: &Table,
        valid: Option<&Table>,
        items: Option<&Table>,
        users: Option<&Table>,
    ) -> Result<StageResult> {
        if train.num_rows() == 0 {
            return Err(Error::data("input `train` has no rows")
                .with_help("look at the filters before it, and at the source's path and columns"));
        }
        let ids = |name: &str, all: Option<&Table>, slot: &str| -> Result<IdMap> {
            let tables = [("train", Some(train)), ("valid", valid), (slot, all)];
            let columns: Vec<IdColumn> = tables
                .into_iter()
                .filter_map(|(slot, table)| Some((slot, table?)))
                .map(|(slot, table)| table.ids(name).map_err(|e| e.at(format!("input `{slot}`"))))
                .collect::<Result<_>>()?;
            IdMap::new(&columns.iter().collect::<Vec<_>>()).map_err(|e| e.at(format!("column `{name}`")))
        };
        let users = ids(USER_ID, users, "users")?;
        let items = ids(ITEM_ID, items, "items")?;
        let histories = Histories::from_pairs(users.len(), &pairs(train, &users, &items)?);
        let held_out = match valid {
            Some(table) => pairs(table, &users, &items)?,
            None => Vec::new(),
        };
        // A user without train interactions has no embedding worth measuring.
        let (known, cold): (Vec<_>, Vec<_>) =
            held_out.into_iter().partition(|&(user, _)| !histories.of(user as usize).is_empty());
        let data = Interactions { n_users: users.len(), n_items: items.len(), train: &histories, valid: &known };

        let opened = self.device.open()?;
        self.progress.observer.note(&opened.why);
        let ctx = FitContext { seed: self.seed, device: &opened.device, watch: &self.progress, checkpoints: None };
        let fit = self.recommender.fit(&data, &ctx)?;
        let best = fit
            .epochs
            .iter()
            .filter_map(|e| e.valid)
            .fold(None, |best: Option<f64>, value| Some(best.map_or(value, |best| best.max(value))));
        if let Some(best) = best {
            let ran = fit.epochs.len();
            self.progress
                .observer
                .note(&format!("epoch {} of {ran} is the best: validation NDCG@10 {best:.4}", fit.best_epoch));
        }
        let distinct: usize = (0..users.len())
            .map(|user| {
                let mut seen = histories.of(user).to_vec();
                seen.sort_unstable();
                seen.dedup();
                seen.len()
            })
            .sum();
        let counters = [
            ("users", json!(users.len())),
            ("items", json!(items.len())),
            ("interactions", json!(distinct)),
            ("epochs", json!(fit.epochs.len())),
            ("best_epoch", json!(fit.best_epoch)),
            ("valid_ndcg_10", json!(best)),
            ("valid_users", json!(known.len())),
            ("valid_cold", json!(cold.len())),
            ("seconds_per_epoch", json!(median(fit.epochs.iter().map(|e| e.seconds).collect()))),
            ("weights_fit_on", json!("train")),
            ("device", json!(opened.device.name())),
        ];
        let result = self.result(fit, users, items)?;
        Ok(counters.into_iter().fold(result, |result, (name, value)| result.with_counter(name, value)))
    }

    fn result(&self, fit: Fit, users: IdMap, items: IdMap) -> Result<StageResult> {
        let log = &fit.epochs;
        let epochs = Table::from_columns(vec![
            ("epoch", Arc::new(Int32Array::from_iter_values(log.iter().map(|e| e.number as i32))), false),
            ("loss", Arc::new(Float64Array::from_iter_values(log.iter().map(|e| e.loss))), false),
            ("valid_ndcg_10", Arc::new(log.iter().map(|e| e.valid).collect::<Float64Array>()), true),
            ("seconds", Arc::new(Float64Array::from_iter_values(log.iter().map(|e| e.seconds))), false),
        ])?;
        let mut result = StageResult::default().with_table("epochs", epochs);
        for (output, id, map, rows) in [
            ("user_embeddings", USER_ID, &users, fit.scorer.user_embeddings()),
            ("item_embeddings", ITEM_ID, &items, fit.scorer.item_embeddings()),
        ] {
            let rows = rows.ok_or_else(|| Error::internal(format!("`{}` has no {output}", self.model)))?;
            result = result.with_table(output, embedding_table(id, map, rows)?);
        }
        let mut card = ModelCard::new(&self.model, self.recommender.hyper(), users.len(), items.len());
        card.best_epoch = fit.best_epoch;
        card.seed = self.seed;
        let model = TrainedModel { card, users, items, scorer: fit.scorer };
        Ok(result.with_artifact("model", Artifact { files: model.to_files()? }))
    }
}

/// `(user, item)` of each row in dense indices.
fn pairs(table: &Table, users: &IdMap, items: &IdMap) -> Result<Vec<(u32, u32)>> {
    let encode = |map: &IdMap, name: &str| -> Result<Vec<u32>> {
        let known =
            |index: Option<u32>| index.ok_or_else(|| Error::internal(format!("an id of `{name}` has no index")));
        map.encode(&table.ids(name)?).into_iter().map(known).collect()
    };
    Ok(encode(users, USER_ID)?.into_iter().zip(encode(items, ITEM_ID)?).collect())
}

/// A list of float32, `[dim]`, as [`EMBEDDING`] promises.
fn vector_field() -> Arc<Field> {
    Arc::new(Field::new_list_field(DataType::Float32, true))
}

fn embedding_schema(id: &str, id_type: DataType) -> SchemaRef {
    let fields = vec![Field::new(id, id_type, false), Field::new(EMBEDDING, DataType::List(vector_field()), false)];
    Arc::new(Schema::new(fields))
}

/// The type of an id column in our own tables, see [`crate::tables::ids`].
pub(super) fn id_type(of: &DataType) -> DataType {
    match of.is_integer() {
        true => DataType::Int64,
        false => DataType::Utf8,
    }
}

fn embedding_table(id: &str, ids: &IdMap, rows: Embeddings<'_>) -> Result<Table> {
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

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Fault;
    use arrow::array::{Array, AsArray, Int64Array, StringArray};
    use arrow::datatypes::Float32Type;
    use std::path::Path;
    use std::sync::Mutex;

    fn resolved(config: Value) -> Result<Box<dyn Stage>> {
        resolve(config, &ResolveContext { root: Path::new("."), history_at_test: "train" })
    }

    #[derive(Default)]
    struct Heard(Mutex<Vec<String>>);

    impl Observer for Heard {
        fn begin(&self, unit: &str, total: u64) {
            self.note(&format!("begin {unit} {total}"));
        }
        fn advance(&self, n: u64) {
            self.note(&format!("advance {n}"));
        }
        fn note(&self, text: &str) {
            self.0.lock().unwrap().push(text.to_owned());
        }
    }

    fn work(model: &str, epochs: u32) -> (Work, Arc<Heard>) {
        let heard = Arc::new(Heard::default());
        let hyper = json!({"epochs": epochs, "embedding_dim": 4, "batch_size": 8});
        let recommender = registry::find(model).unwrap().recommender(&hyper).unwrap().into();
        let progress = Progress { observer: heard.clone(), cancel: Cancel::default() };
        (Work { model: model.to_owned(), recommender, device: DeviceChoice::Cpu, seed: 7, progress }, heard)
    }

    fn log(pairs: &[(&str, i64)]) -> Table {
        Table::from_columns(vec![
            (USER_ID, Arc::new(StringArray::from_iter_values(pairs.iter().map(|p| p.0))), false),
            (ITEM_ID, Arc::new(Int64Array::from_iter_values(pairs.iter().map(|p| p.1))), false),
        ])
        .unwrap()
    }

    fn items(ids: &[i64]) -> Table {
        Table::from_columns(vec![(ITEM_ID, Arc::new(Int64Array::from(ids.to_vec())), false)]).unwrap()
    }

    fn memory(result: &StageResult, name: &str) -> Table {
        match &result.tables[name] {
            super::super::context::OutputTable::Memory(table) => table.clone(),
            super::super::context::OutputTable::Stream(_) => panic!("a table in memory was expected"),
        }
    }

    #[test]
    fn all_outputs_are_made_and_indices_stand_for_sorted_ids() {
        let train = log(&[("b", 10), ("b", 30), ("a", 10), ("a", 10), ("c", 20)]);
        let valid = log(&[("a", 30), ("d", 10)]);
        let (work, heard) = work("lightgcn", 4);
        let result = work.run(&train, Some(&valid), Some(&items(&[40, 10, 20, 30])), None).unwrap();
        for (name, value) in [
            ("users", json!(4)),
            ("items", json!(4)),
            ("interactions", json!(4)),
            ("epochs", json!(4)),
            ("valid_users", json!(1)),
            ("valid_cold", json!(1)), // user d has no train interactions
            ("weights_fit_on", json!("train")),
            ("device", json!("cpu")),
        ] {
            assert_eq!(result.counters[name], value, "{name}");
        }
        assert!(result.counters["valid_ndcg_10"].is_number() && result.counters["seconds_per_epoch"].is_number());

        let model = TrainedModel::from_files(&result.artifacts["model"].files).unwrap();
        assert_eq!((model.card.model.as_str(), model.card.seed, model.card.users), ("lightgcn", 7, 4));
        assert_eq!(model.card.hyper["layers"], 3);
        let users = memory(&result, "user_embeddings");
        assert_eq!(users.strings(USER_ID).unwrap().into_iter().flatten().collect::<Vec<_>>(), ["a", "b", "c", "d"]);
        assert_eq!(memory(&result, "item_embeddings").i64s(ITEM_ID).unwrap(), [10, 20, 30, 40]);
        let vectors = users.column(EMBEDDING).unwrap();
        let of_b = vectors.as_list::<i32>().value(1);
        let embeddings = model.scorer.user_embeddings().unwrap();
        assert_eq!(of_b.as_primitive::<Float32Type>().values(), &embeddings.values[4..8]);

        let epochs = memory(&result, "epochs");
        assert_eq!(epochs.schema(), epochs_schema());
        assert_eq!(epochs.i32s("epoch").unwrap(), [1, 2, 3, 4]);
        assert_eq!(epochs.column("valid_ndcg_10").unwrap().null_count(), 2); // measured every second epoch
        let heard = heard.0.lock().unwrap();
        assert_eq!(heard[1], "begin epochs 4");
        assert!(heard[0].contains("cpu") && heard.last().unwrap().contains("validation NDCG@10"), "{heard:?}");
        assert_eq!(heard.iter().filter(|h| *h == "advance 1").count(), 4);
    }

    #[test]
    fn without_validation_no_figure_is_invented() {
        let (work, _) = work("mf", 2);
        let result = work.run(&log(&[("a", 1), ("b", 2)]), None, None, None).unwrap();
        assert_eq!(result.counters["valid_ndcg_10"], Value::Null);
        assert_eq!(result.counters["best_epoch"], json!(2));
    }

    #[test]
    fn input_that_is_wrong_is_named() {
        let (work, _) = work("mf", 2);
        let error = work.run(&log(&[]), None, None, None).err().unwrap();
        assert_eq!((error.fault, error.message.contains("`train`")), (Fault::Data, true));
        let error = work.run(&items(&[1]), None, None, None).err().unwrap();
        assert!(error.message.contains("`train`") && error.message.contains("`user_id`"), "{error}");
        let strings = Table::from_columns(vec![(ITEM_ID, Arc::new(StringArray::from(vec!["1"])), false)]).unwrap();
        let error = work.run(&log(&[("a", 1)]), None, Some(&strings), None).err().unwrap();
        assert_eq!((error.fault, error.message.contains("`item_id`")), (Fault::Data, true));
    }

    #[test]
    fn a_stop_request_ends_the_fit() {
        let (work, _) = work("mf", 2);
        work.progress.cancel.request(15);
        let error = work.run(&log(&[("a", 1), ("b", 2)]), None, None, None).err().unwrap();
        assert_eq!(error.fault, Fault::Terminated);
    }

    #[test]
    fn the_ids_of_a_split_are_found_beside_its_train_part() {
        let slots = |config: Value| {
            let stage = resolved(config).unwrap();
            stage.inputs().into_iter().map(|i| format!("{}={}", i.slot, i.reference)).collect::<Vec<_>>()
        };
        assert_eq!(
            slots(json!({"model": "mf", "train": "parts.train", "valid": "parts.valid"})),
            ["train=parts.train", "valid=parts.valid", "items=parts.items", "users=parts.users"]
        );
        assert_eq!(slots(json!({"model": "mf", "train": "log"})), ["train=log"]);
        assert_eq!(
            slots(json!({"model": "mf", "train": "parts.train", "items": "catalogue", "users": ""})),
            ["train=parts.train", "items=catalogue"]
        );
    }

    #[test]
    fn the_identity_holds_every_hyper_parameter() {
        let identity = resolved(json!({"model": "lightgcn", "train": "x", "hyper": {"layers": 2}})).unwrap().identity();
        assert_eq!(identity["hyper"]["layers"], 2);
        assert_eq!(identity["hyper"]["embedding_dim"], 64);
        let error = resolved(json!({"model": "mf", "train": "x", "hyper": {"layers": 2}})).err().unwrap();
        assert_eq!((error.fault, error.message.contains("`layers`")), (Fault::Spec, true));
        assert_eq!(resolved(json!({"model": "gcn", "train": "x"})).err().unwrap().fault, Fault::Spec);
    }

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
