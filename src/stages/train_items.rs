//! `train_items`: fits the item model, layers of an LLM over item embeddings made of titles (`item` mode).
//!
//! In: train interactions, perhaps held-out ones, the item table with titles, an LLM. Out: artifact `model` for `recommend` and
//! `rerank_items`, item and user embeddings, the training log. The model is in [`crate::llm::item`].

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::context::{
    Artifact, Cancel, InputSlot, Observer, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What,
};
use super::registry::StageKind;
use super::train::data::{FitOn, Log, Tables, TrainData};
use super::train::outputs::{embedding_schema, embedding_table, epochs_schema, epochs_table, id_type};
use super::train::progress::FitProgress;
use super::train::savings::{Savings, key_of};
use super::train::{checkpoint_every, default_checkpoint_seconds};
use crate::columns::{ITEM_ID, TITLE, USER_ID};
use crate::device::DeviceChoice;
use crate::error::{Error, Result};
use crate::llm::Llm;
use crate::llm::item::{BACKBONE, ItemHyper, TitleTable, fit};
use crate::llm::weights::Weights;
use crate::prompts::clean_title;
use crate::recommenders::saved::{ModelCard, TrainedModel};
use crate::recommenders::{FitContext, Scorer, Task};

/// `kind = "train_items"`.
pub const KIND: StageKind = StageKind {
    name: "train_items",
    version: 1,
    about: "Fits the item model: layers of an LLM over item embeddings that are made of titles.",
    sample: "train = \"parts.train\"\nvalid = \"parts.valid\"\nitems = \"items\"\nmodel = \"smollm2-135m-instruct\"\nhyper = { layers = 12 }\n",
    schema: || schemars::schema_for!(TrainItemsConfig),
    resolve,
};

/// Fits the item model: a sequence model whose positions are items, not words.
///
/// An item is what the LLM makes of its title, projected, plus a residual that is learned; the LLM's first layers run over the
/// history, and the next item is the one whose vector is nearest. It is no prompting: the LLM reads no instruction and writes no
/// text. What it gives is a recommender like those of `train`: `recommend`, `similar`, `evaluate` read its outputs, and
/// `rerank_items` orders a shortlist by it.
///
/// An item without train interactions is ranked by its title from the start. A fit that was stopped goes on from its last
/// checkpoint, as one of `train` does. With `hyper.init = "random"` the layers start from random weights: compare the
/// two before you credit the LLM with the gain.
///
/// Counters: `users`, `items`, `items_with_title`, `interactions`, `epochs`, `best_epoch`, `valid_ndcg_10`, `valid_users`, `valid_cold`,
/// `seconds_per_epoch` (median, without validation), `device`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainItemsConfig {
    /// What to learn from: `user_id`, `item_id`, oldest first within a user.
    pub train: String,
    /// Held-out interactions, the same columns: NDCG@10 on them decides which epoch is kept and when training stops.
    /// Without it exactly `hyper.epochs` epochs are run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid: Option<String>,
    /// The item table: `item_id`, `title`. All its items can be recommended, also those without interactions.
    pub items: String,
    /// A table whose `user_id` lists all users; `X.users` where `train` is `X.train`, `""` for those of `train` and `valid` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<String>,
    /// The LLM (catalogue name or path): its titles' hidden states, its layers.
    pub model: String,
    /// Hyper-parameters; what is not given has its default.
    #[serde(default)]
    pub hyper: ItemHyper,
    /// Characters of a title at most; longer ones are cut; default 120.
    #[serde(default = "default_max_title_chars")]
    #[schemars(range(min = 8))]
    pub max_title_chars: usize,
    /// Seconds of training that a stopped run may lose: a checkpoint is kept so often, between two epochs.
    #[serde(default = "default_checkpoint_seconds")]
    #[schemars(range(min = 0.0))]
    pub checkpoint_seconds: f64,
}

fn default_max_title_chars() -> usize {
    120
}

fn resolve(config: Value, _: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let mut config: TrainItemsConfig =
        serde_json::from_value(config).map_err(|e| Error::spec("the config of a `train_items` stage").because(e))?;
    config.hyper.check()?;
    config.hyper = config.hyper.resolved();
    if config.max_title_chars < 8 {
        return Err(Error::spec(format!("`max_title_chars` is {}; it must be at least 8", config.max_title_chars)));
    }
    let beside = config.train.strip_suffix(".train").map(|stage| format!("{stage}.users"));
    config.users = config.users.or(beside).filter(|r| !r.is_empty());
    let every = checkpoint_every(config.checkpoint_seconds)?;
    Ok(Box::new(TrainItems { config, every }))
}

struct TrainItems {
    config: TrainItemsConfig,
    every: Duration,
}

#[async_trait]
impl Stage for TrainItems {
    fn inputs(&self) -> Vec<InputSlot> {
        let c = &self.config;
        let pairs: &[&'static str] = &[USER_ID, ITEM_ID];
        let mut slots =
            vec![InputSlot::table("train", &c.train, pairs), InputSlot::table("items", &c.items, &[ITEM_ID, TITLE])];
        slots.extend(c.valid.as_ref().map(|r| InputSlot::table("valid", r, pairs)));
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
            table("user_embeddings", "`user_id` and `embedding` (the state after the train history), sorted by user."),
            table("item_embeddings", "`item_id` and `embedding`, one row per item, sorted by item."),
            table("epochs", "The training log: `epoch`, `loss`, `valid_ndcg_10`, `seconds`."),
        ]
    }

    fn identity(&self) -> Value {
        let mut identity = json!(self.config);
        // How often a checkpoint is taken changes nothing but what a kill costs.
        identity.as_object_mut().map(|map| map.shift_remove("checkpoint_seconds"));
        identity
    }

    fn models(&self) -> Vec<String> {
        vec![self.config.model.clone()]
    }

    async fn plan_schemas(&self, inputs: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        let mut schemas = BTreeMap::from([("epochs".to_owned(), epochs_schema(Task::Sequential))]);
        for (output, id) in [("user_embeddings", USER_ID), ("item_embeddings", ITEM_ID)] {
            if let Some(Ok(field)) = inputs.get("train").map(|train| train.field_with_name(id)) {
                schemas.insert(output.to_owned(), embedding_schema(id, id_type(field.data_type())));
            }
        }
        Ok(schemas)
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        let tables = Tables::collect(ctx).await?;
        let model = ctx.model(&self.config.model)?;
        let work = Work {
            hyper: self.config.hyper.clone(),
            max_title_chars: self.config.max_title_chars,
            llm: (model.path.clone(), model.digest.clone()),
            device: ctx.device,
            seed: ctx.seed,
            savings: Savings::new(&ctx.savings),
            every: self.every,
            observer: ctx.observer.clone(),
            cancel: ctx.cancel.clone(),
        };
        tokio::task::spawn_blocking(move || work.run(&tables)).await?
    }
}

/// What goes to the worker thread.
struct Work {
    hyper: ItemHyper,
    max_title_chars: usize,
    /// Path and digest.
    llm: (PathBuf, String),
    device: DeviceChoice,
    seed: u64,
    savings: Savings,
    every: Duration,
    observer: Arc<dyn Observer>,
    cancel: Cancel,
}

impl Work {
    fn run(&self, tables: &Tables) -> Result<StageResult> {
        let data = TrainData::ranking(tables)?;
        let Log::Ranking(log) = &data.log else {
            return Err(Error::internal("a log of ratings where interactions were read"));
        };
        let titles = self.titles(tables, &data)?;
        let with_title = titles.iter().filter(|t| t.is_some()).count();
        let weights = Weights::open(&self.llm.0)?;
        if self.hyper.layers as usize > weights.config().layers {
            return Err(Error::spec(format!(
                "`hyper.layers` is {}, but the model has {} layers",
                self.hyper.layers,
                weights.config().layers
            )));
        }
        let table = self.embed(&weights, &titles)?;
        let opened = self.device.open()?;
        self.observer.note(&opened.why);
        let watch = FitProgress::of_stage(self.observer.clone(), self.cancel.clone(), ("NDCG@10", 1.0));
        let checkpoints = self.savings.checkpoints(&self.key(&data, &titles), self.every);
        let ctx = FitContext {
            seed: self.seed,
            device: &opened.device,
            watch: &watch,
            checkpoints: Some(&checkpoints),
            warm: None,
        };
        let interactions = log.interactions(data.items.len(), FitOn::Train);
        let fitted = fit(&self.hyper, &weights, table, &interactions, &ctx)?;
        checkpoints.clear()?;
        let valid = fitted.epochs.iter().filter_map(|e| e.valid).reduce(f64::max);
        if let Some(valid) = valid {
            let (best, ran) = (fitted.best_epoch, fitted.epochs.len());
            self.observer.note(&format!("epoch {best} of {ran} is the best: validation NDCG@10 {valid:.4}"));
        }
        let mut seconds: Vec<f64> = fitted.epochs.iter().map(|e| e.seconds).collect();
        seconds.sort_by(f64::total_cmp);
        let counters = [
            ("users", json!(data.users.len())),
            ("items", json!(data.items.len())),
            ("items_with_title", json!(with_title)),
            ("interactions", json!(log.distinct(FitOn::Train))),
            ("epochs", json!(fitted.epochs.len())),
            ("best_epoch", json!(fitted.best_epoch)),
            ("valid_ndcg_10", json!(valid)),
            ("valid_users", json!(log.valid.len())),
            ("valid_cold", json!(log.cold)),
            ("seconds_per_epoch", json!(seconds.get(seconds.len() / 2))),
            ("device", json!(opened.device.name())),
        ];
        let mut result =
            StageResult::default().with_table("epochs", epochs_table(Task::Sequential, 1.0, &fitted.epochs)?);
        let (users, items) = (fitted.scorer.user_embeddings(), fitted.scorer.item_embeddings());
        for (output, id, map, rows) in
            [("user_embeddings", USER_ID, &data.users, users), ("item_embeddings", ITEM_ID, &data.items, items)]
        {
            let rows = rows.ok_or_else(|| Error::internal(format!("the item model has no {output}")))?;
            result = result.with_table(output, embedding_table(id, map, rows)?);
        }
        let mut card = ModelCard::new(BACKBONE.name, fitted.scorer.card()?, data.users.len(), data.items.len());
        card.best_epoch = fitted.best_epoch;
        card.seed = self.seed;
        card.data_sha256 = data.fingerprint(FitOn::Train);
        card.metrics.extend(valid.map(|value| ("valid_ndcg_10".to_owned(), value)));
        let model = TrainedModel {
            card,
            users: data.users,
            items: data.items,
            scorer: Box::new(fitted.scorer) as Box<dyn Scorer>,
        };
        result = result.with_artifact("model", Artifact { files: model.to_files()? });
        Ok(counters.into_iter().fold(result, |result, (name, value)| result.with_counter(name, value)))
    }

    /// The clean title of each item, where there is one; of several rows of an item the first one counts.
    fn titles(&self, tables: &Tables, data: &TrainData) -> Result<Vec<Option<String>>> {
        let table = tables.items.as_ref().ok_or_else(|| Error::internal("no item table"))?;
        let (mut titles, mut known) = (vec![None; data.items.len()], vec![false; data.items.len()]);
        let ids = data.items.encode(&table.ids(ITEM_ID)?);
        for (item, title) in ids.into_iter().flatten().zip(table.strings(TITLE)?) {
            if !std::mem::replace(&mut known[item as usize], true) {
                titles[item as usize] = title.and_then(|t| clean_title(&t, self.max_title_chars));
            }
        }
        Ok(titles)
    }

    fn embed(&self, weights: &Weights, titles: &[Option<String>]) -> Result<TitleTable> {
        let dim = weights.config().hidden;
        if !self.hyper.text {
            let known = titles.iter().map(Option::is_some).collect();
            let size = crate::llm::item::text::token_size(weights)?;
            return Ok(TitleTable { dim, values: vec![0.0; titles.len() * dim], known, size });
        }
        let llm = Llm::open(&self.llm.0, self.device)?;
        self.observer.status("titles through the LLM");
        TitleTable::embed(&llm, weights, titles, &mut |_| self.cancel.check())
    }

    /// What a checkpoint depends on.
    fn key(&self, data: &TrainData, titles: &[Option<String>]) -> String {
        key_of(&json!({
            "kind": KIND.name,
            "version": KIND.version,
            "hyper": self.hyper,
            "seed": self.seed,
            "llm": self.llm.1,
            "titles": key_of(&json!(titles)),
            "data": data.fit_fingerprint(FitOn::Train),
        }))
    }
}
