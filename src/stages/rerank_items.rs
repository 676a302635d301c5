//! `rerank_items`: a fitted model orders each user's shortlist; the same table as the LLM's `rerank` gives.
//!
//! In: artifact `model` of `train_items`, a shortlist, what users have seen. Out: `reranked` and `not_asked`, for `calibrate` and
//! `fuse`.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Float32Array, Int32Array, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::context::{
    Artifact, Cancel, InputSlot, Observer, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What,
};
use super::recommend::ids_like;
use super::registry::StageKind;
use super::train::outputs::id_type;
use super::train::savings::hex;
use crate::columns::{ITEM_ID, LLM_ASKED_AT, LLM_RANK, LLM_SCORE, PROMPT_DIGEST, REASON, REC_RANK, SOURCE, USER_ID};
use crate::error::{Error, Result};
use crate::interactions::{Histories, IdMap};
use crate::recommenders::saved::TrainedModel;
use crate::tables::Table;

/// `kind = "rerank_items"`.
pub const KIND: StageKind = StageKind {
    name: "rerank_items",
    version: 1,
    about: "Orders each user's shortlist by the item model, as `rerank` does by prompts.",
    sample: "model = \"items_llm.model\"\nshortlist = \"shortlist\"\nhistory = \"parts.history\"\n",
    schema: || schemars::schema_for!(RerankItemsConfig),
    resolve,
};

/// Orders each user's shortlist by the item model of a `train_items` stage.
///
/// The output has the columns of `rerank`'s, so that `calibrate` and `fuse` weigh it as they weigh an LLM that was asked: `llm_rank` is
/// its order, `llm_score` its score, `prompt_digest` names model, history and candidates. All users are asked: one costs a pass
/// over the history, whatever the length of the shortlist. Candidates of equal score keep the recommender's order.
///
/// Counters: `users_asked`, `users_not_asked`, `candidates_unknown` (items that the model does not know; they come last, in the
/// recommender's order).
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RerankItemsConfig {
    /// The `model` output of a `train_items` stage.
    pub model: String,
    /// The recommender's shortlists: `user_id`, `item_id`, `rec_rank`.
    pub shortlist: String,
    /// What each user has seen, `user_id` and `item_id`, oldest first within a user. Take `history` of a `split` stage to rank test
    /// items, `train` to rank validation items.
    pub history: String,
    /// Only users who occur in this table's `user_id` are asked, for instance `valid` of a `split` stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<String>,
}

fn resolve(config: Value, _: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: RerankItemsConfig =
        serde_json::from_value(config).map_err(|e| Error::spec("the config of a `rerank_items` stage").because(e))?;
    Ok(Box::new(RerankItems { config }))
}

struct RerankItems {
    config: RerankItemsConfig,
}

#[async_trait]
impl Stage for RerankItems {
    fn inputs(&self) -> Vec<InputSlot> {
        let c = &self.config;
        let mut slots = vec![
            InputSlot::artifact("model", &c.model),
            InputSlot::table("shortlist", &c.shortlist, &[USER_ID, ITEM_ID, REC_RANK]),
            InputSlot::table("history", &c.history, &[USER_ID, ITEM_ID]),
        ];
        slots.extend(c.users.as_ref().map(|r| InputSlot::table("users", r, &[USER_ID])));
        slots
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        let table = |name, about| OutputSlot { name, what: What::Table, about };
        vec![
            table("reranked", "user_id, item_id, llm_rank, llm_score, prompt_digest, llm_asked_at, source; best first"),
            table("not_asked", "user_id, source, reason"),
        ]
    }

    fn identity(&self) -> Value {
        json!(self.config)
    }

    async fn plan_schemas(&self, inputs: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        let id = |name: &str| {
            let field = inputs.get("shortlist").and_then(|s| s.field_with_name(name).ok());
            field.map(|f| id_type(f.data_type()))
        };
        let (Some(user), Some(item)) = (id(USER_ID), id(ITEM_ID)) else { return Ok(BTreeMap::new()) };
        let schema = |columns: Vec<(&str, DataType)>| -> SchemaRef {
            Arc::new(Schema::new(columns.into_iter().map(|(n, t)| Field::new(n, t, false)).collect::<Vec<_>>()))
        };
        let instant = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
        let reranked = vec![
            (USER_ID, user.clone()),
            (ITEM_ID, item),
            (LLM_RANK, DataType::Int32),
            (LLM_SCORE, DataType::Float32),
            (PROMPT_DIGEST, DataType::Utf8),
            (LLM_ASKED_AT, instant),
            (SOURCE, DataType::Utf8),
        ];
        let not_asked = vec![(USER_ID, user), (SOURCE, DataType::Utf8), (REASON, DataType::Utf8)];
        Ok(BTreeMap::from([("reranked".to_owned(), schema(reranked)), ("not_asked".to_owned(), schema(not_asked))]))
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        let (digest, artifact) = ctx.artifact("model")?;
        let (digest, artifact) = (digest.to_owned(), artifact.clone());
        let shortlist = ctx.collect("shortlist").await?;
        let history = ctx.collect("history").await?;
        let users = ctx.collect_opt("users").await?;
        let (observer, cancel) = (ctx.observer.clone(), ctx.cancel.clone());
        let asked_at = chrono::Utc::now().timestamp_micros();
        tokio::task::spawn_blocking(move || {
            let orders = Orders::new(&artifact, &digest, &shortlist, &history, users.as_ref())?;
            orders.run(observer.as_ref(), &cancel, asked_at)
        })
        .await?
    }
}

/// Users that are scored in one block.
const BLOCK: usize = 64;

/// Shortlists and histories in the model's indices.
struct Orders {
    model: TrainedModel,
    digest: String,
    /// Users and items of the shortlist.
    users: IdMap,
    items: IdMap,
    /// Recommender's order, by the shortlist's indices.
    shortlists: Histories,
    /// By the model's indices.
    seen: Histories,
    /// Users of the shortlist who are asked, and those who are not with the reason.
    asked: Vec<u32>,
    not_asked: Vec<(u32, &'static str)>,
}

impl Orders {
    fn new(
        artifact: &Artifact,
        digest: &str,
        shortlist: &Table,
        history: &Table,
        only: Option<&Table>,
    ) -> Result<Self> {
        let model = TrainedModel::from_files(&artifact.files).map_err(|e| e.at("input `model`"))?;
        let of = |table, slot, name, map: &IdMap| ids_like(table, slot, name, map);
        let list_users = of(shortlist, "shortlist", USER_ID, &model.users)?;
        let list_items = of(shortlist, "shortlist", ITEM_ID, &model.items)?;
        let (users, items) = (IdMap::new(&[&list_users])?, IdMap::new(&[&list_items])?);
        let mut rows: Vec<(u32, i32, u32)> = (users.encode(&list_users).into_iter().flatten())
            .zip(shortlist.i32s(REC_RANK)?)
            .zip(items.encode(&list_items).into_iter().flatten())
            .map(|((user, rank), item)| (user, rank, item))
            .collect();
        rows.sort_unstable();
        let pairs: Vec<(u32, u32)> = rows.into_iter().map(|(user, _, item)| (user, item)).collect();
        let shortlists = Histories::from_pairs(users.len(), &pairs);
        let history_users = model.users.encode(&of(history, "history", USER_ID, &model.users)?);
        let history_items = model.items.encode(&of(history, "history", ITEM_ID, &model.items)?);
        let known: Vec<(u32, u32)> =
            history_users.into_iter().zip(history_items).filter_map(|(u, i)| Some((u?, i?))).collect();
        let seen = Histories::from_pairs(model.users.len(), &known);
        let wanted = only.map(|t| of(t, "users", USER_ID, &model.users)).transpose()?;
        let wanted = wanted.map(|ids| IdMap::new(&[&ids])).transpose()?;
        let (mut asked, mut not_asked) = (Vec::new(), Vec::new());
        for user in 0..users.len() as u32 {
            let id = users.ids().get(user as usize);
            if wanted.as_ref().is_some_and(|w| w.get(&id).is_none()) {
                not_asked.push((user, "not_asked"));
                continue;
            }
            match model.users.get(&id) {
                Some(known) if !seen.of(known as usize).is_empty() => asked.push(user),
                _ => not_asked.push((user, "cold_user")),
            }
        }
        Ok(Orders { model, digest: digest.to_owned(), users, items, shortlists, seen, asked, not_asked })
    }

    fn run(&self, observer: &dyn Observer, cancel: &Cancel, asked_at: i64) -> Result<StageResult> {
        observer.begin("users", self.asked.len() as u64);
        let scorer = self.model.scorer.as_ref();
        let informed = scorer.with_history(&self.seen);
        let scorer = informed.as_deref().unwrap_or(scorer);
        let model_items = self.model.items.encode(self.items.ids());
        let model_users = self.model.users.encode(self.users.ids());
        let n_items = scorer.n_items();
        // `(user, item, rank, score)`, and a digest for each user.
        let mut rows: Vec<(u32, u32, i32, f32)> = Vec::new();
        let mut digests: Vec<String> = Vec::new();
        let mut unknown = 0usize;
        for block in self.asked.chunks(BLOCK) {
            cancel.check()?;
            let users: Vec<u32> = block.iter().filter_map(|&user| model_users[user as usize]).collect();
            let mut scores = vec![0f32; users.len() * n_items];
            scorer.score(&users, &self.seen, &mut scores);
            for ((&user, &known), scores) in block.iter().zip(&users).zip(scores.chunks_exact(n_items.max(1))) {
                let list = self.shortlists.of(user as usize);
                let score = |item: u32| model_items[item as usize].map_or(f32::MIN, |i| scores[i as usize]);
                if let Some(&item) = list.iter().find(|&&item| score(item).is_nan()) {
                    let id = self.items.ids().get(item as usize);
                    return Err(Error::data(format!("input `model`: the score of item `{id}` is not a number")));
                }
                unknown += list.iter().filter(|&&item| model_items[item as usize].is_none()).count();
                let mut order = list.to_vec();
                // Stable: equal scores keep the recommender's order.
                order.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
                let digest = self.digest_of(known, list);
                for (place, item) in order.into_iter().enumerate() {
                    rows.push((user, item, place as i32 + 1, score(item)));
                    digests.push(digest.clone());
                }
            }
            observer.advance(block.len() as u64);
        }
        let n = rows.len();
        let users = self.users.ids().take(rows.iter().map(|r| r.0 as usize));
        let items = self.items.ids().take(rows.iter().map(|r| r.1 as usize));
        let reranked = Table::from_columns(vec![
            (USER_ID, users.to_array(), false),
            (ITEM_ID, items.to_array(), false),
            (LLM_RANK, Arc::new(Int32Array::from_iter_values(rows.iter().map(|r| r.2))), false),
            (LLM_SCORE, Arc::new(Float32Array::from_iter_values(rows.iter().map(|r| r.3))), false),
            (PROMPT_DIGEST, Arc::new(StringArray::from_iter_values(digests)), false),
            (LLM_ASKED_AT, Arc::new(TimestampMicrosecondArray::from(vec![asked_at; n]).with_timezone("UTC")), false),
            (SOURCE, Arc::new(StringArray::from_iter_values(std::iter::repeat_n("fused", n))), false),
        ])?;
        let left_out = self.users.ids().take(self.not_asked.iter().map(|r| r.0 as usize));
        let not_asked = Table::from_columns(vec![
            (USER_ID, left_out.to_array(), false),
            (SOURCE, Arc::new(StringArray::from_iter_values(self.not_asked.iter().map(|_| "recommender"))), false),
            (REASON, Arc::new(StringArray::from_iter_values(self.not_asked.iter().map(|r| r.1))), false),
        ])?;
        Ok(StageResult::default()
            .with_table("reranked", reranked)
            .with_table("not_asked", not_asked)
            .with_counter("users_asked", self.asked.len())
            .with_counter("users_not_asked", self.not_asked.len())
            .with_counter("candidates_unknown", unknown))
    }

    /// Of all that a user's order depends on.
    fn digest_of(&self, user: u32, list: &[u32]) -> String {
        let mut hash = Sha256::new();
        hash.update(self.digest.as_bytes());
        for (map, items) in [(&self.model.items, self.seen.of(user as usize)), (&self.items, list)] {
            hash.update((items.len() as u64).to_le_bytes());
            for &item in items {
                let id = map.ids().get(item as usize).to_string();
                hash.update((id.len() as u64).to_le_bytes());
                hash.update(id.as_bytes());
            }
        }
        hex(hash.finalize().as_slice())
    }
}
