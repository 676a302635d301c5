//! Stage `rerank`: the LLM orders the shortlist, tail first, within a budget.
//!
//! In: prompts (from `prompt`), N(u) per user (from the long-tail SQL), an LLM in this process or behind a server. Out:
//! one order of the candidates per user that was asked or keeps an earlier order (`reranked`), the users without one,
//! with the reason (`not_asked`), and how much the order of the candidates in the prompts mattered (`order_bias`).
//! Every answer goes to the ledger first, so a killed run resumes row by row.

mod config;
mod estimate;
mod local;
mod orders;
mod questions;
mod server;
mod whom;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use async_trait::async_trait;

pub use self::config::{Budget, Mode, Normalise, Order, RerankConfig, Reuse};
use self::orders::{Kept, not_asked, orders};
use self::questions::{Maker, Prompts, Question, interactions_of};
use self::whom::{Known, Whom, asking_order, divide};
use crate::columns::*;
use crate::error::{Error, Result};
use crate::fusion::{Calibration, calibration};
use crate::llm::ChatTokenizer;
use crate::llm::ledger::Ledger;
use crate::llm::ledger::orders::Orders;
use crate::llm::remote::{Dialect, RemoteSpec};
use crate::stages::context::{ASK_AGAIN, ASKED_TOKENS, Estimate, Minutes, Shard};
use crate::stages::{
    InputSlot, ModelFile, OutputSlot, ResolveContext, Stage, StageContext, StageKind, StageResult, What,
};
use crate::tables::Id;

/// The registry's entry.
pub const KIND: StageKind = StageKind {
    name: "rerank",
    version: 2,
    about: "The LLM orders each user's shortlist, users of the long tail first, within a budget.",
    sample: "prompts = \"prompts\"\nlong_tail = \"tail\"\nmodel = \"smollm2-135m-instruct\"\nbudget = { users = 100 }\n",
    schema: || schemars::schema_for!(RerankConfig),
    resolve,
};

fn resolve(config: serde_json::Value, _ctx: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: RerankConfig =
        serde_json::from_value(config).map_err(|e| Error::spec("the config does not fit").because(e))?;
    let remote = config.resolve()?;
    Ok(Box::new(Rerank { config, remote, no_weight: false, shard: None }))
}

struct Rerank {
    config: RerankConfig,
    /// The server, where there is one.
    remote: Option<RemoteSpec>,
    /// Whether a calibration gives the LLM no weight, so that nobody is asked.
    no_weight: bool,
    /// The share of the users that is asked, where others ask the rest.
    shard: Option<Shard>,
}

/// The inputs, opened.
struct Opened {
    prompts: Prompts,
    interactions: HashMap<Id, i64>,
    chat: Option<ChatTokenizer>,
}

/// Slot of the calibration.
const CALIBRATION: &str = "calibration";
/// Reason: the calibration gives the LLM no weight.
const NO_WEIGHT: &str = "a1_is_0";

#[async_trait]
impl Stage for Rerank {
    fn inputs(&self) -> Vec<InputSlot> {
        let mut prompts = vec![USER_ID, PERMUTATION, SYSTEM, PROMPT, CANDIDATES, CANDIDATE_TITLES, PROMPT_TOKENS];
        if self.config.reuse.is_some() {
            prompts.extend([HISTORY_DIGEST, CANDIDATE_PLACES]);
        }
        let mut inputs = vec![
            InputSlot::table("prompts", &self.config.prompts, &prompts),
            InputSlot::table("long_tail", &self.config.long_tail, &[USER_ID, INTERACTIONS]),
        ];
        if let Some(skipped) = &self.config.skipped {
            inputs.push(InputSlot::table("skipped", skipped, &[USER_ID, REASON]));
        }
        inputs.extend(self.config.calibration.as_ref().map(|r| InputSlot::artifact(CALIBRATION, r)));
        inputs
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        let table = |name, about| OutputSlot { name, what: What::Table, about };
        vec![
            table("reranked", "user_id, item_id, llm_rank, llm_score, prompt_digest, llm_asked_at, source; best first"),
            table("not_asked", "user_id, source, reason"),
            table(
                "order_bias",
                "users with several prompts: user_id, prompts, first_places, first_changed, kendall_tau",
            ),
        ]
    }

    /// Neither where a server is nor how patiently it is asked, and no name of a key.
    fn identity(&self) -> serde_json::Value {
        let mut identity = serde_json::json!(self.config);
        // Minutes become users before the stage starts; those are in it.
        if let Some(budget) = identity["budget"].as_object_mut() {
            budget.shift_remove("minutes");
        }
        if let Some(spec) = &self.remote {
            identity["engine"] = spec.identity();
        }
        identity
    }

    fn models(&self) -> Vec<String> {
        match self.remote.is_none() || self.needs_template() {
            true => self.config.model.iter().cloned().collect(),
            false => Vec::new(),
        }
    }

    fn estimate(
        &self,
        counters: &BTreeMap<String, serde_json::Map<String, serde_json::Value>>,
        models: &BTreeMap<String, ModelFile>,
    ) -> Estimate {
        let mut estimate = estimate::asked(self.config.budget, counters.get("prompts"));
        if self.remote.is_none() {
            estimate.memory_bytes = models.values().next().and_then(|m| estimate::memory(&m.path));
        }
        estimate
    }

    fn minutes(&self) -> Minutes {
        match (self.config.order, self.config.budget.minutes) {
            (_, Some(minutes)) => Minutes::Set(minutes),
            (Order::TailFirst, None) => Minutes::Open,
            (Order::Random, None) => Minutes::No,
        }
    }

    fn for_users(&self, users: u64) -> Option<Box<dyn Stage>> {
        let mut config = self.config.clone();
        let most = config.budget.users.map_or(users, |most| most.min(users));
        config.budget = Budget { users: Some(most), minutes: None, ..config.budget };
        let (remote, no_weight, shard) = (self.remote.clone(), self.no_weight, self.shard);
        Some(Box::new(Rerank { config, remote, no_weight, shard }))
    }

    async fn users_within(&self, ctx: &StageContext, tokens: f64) -> Result<u64> {
        match self.calibrated(ctx)? {
            Some(calibrated) => calibrated.within(ctx, tokens).await,
            None => self.within(ctx, tokens).await,
        }
    }

    fn shard(&self, shard: Shard) -> Option<Box<dyn Stage>> {
        let (config, remote) = (self.config.clone(), self.remote.clone());
        Some(Box::new(Rerank { config, remote, no_weight: self.no_weight, shard: Some(shard) }))
    }

    async fn plan_schemas(&self, inputs: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        let Some(prompts) = inputs.get("prompts") else { return Ok(BTreeMap::new()) };
        let user = prompts.field_with_name(USER_ID).ok().map(|f| f.data_type().clone());
        let item = prompts.field_with_name(CANDIDATES).ok().and_then(|f| match f.data_type() {
            DataType::List(item) => Some(item.data_type().clone()),
            _ => None,
        });
        let (Some(user), Some(item)) = (user, item) else { return Ok(BTreeMap::new()) };
        let schema = |columns: &[(&str, DataType)]| -> SchemaRef {
            let field = |(n, t): &(&str, DataType)| Field::new(*n, t.clone(), *n == LLM_SCORE);
            Arc::new(Schema::new(columns.iter().map(field).collect::<Vec<_>>()))
        };
        let instant = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
        let reranked = [
            (USER_ID, user.clone()),
            (ITEM_ID, item),
            (LLM_RANK, DataType::Int32),
            (LLM_SCORE, DataType::Float32),
            (PROMPT_DIGEST, DataType::Utf8),
            (LLM_ASKED_AT, instant),
            (SOURCE, DataType::Utf8),
        ];
        let not_asked = [(USER_ID, user.clone()), (SOURCE, DataType::Utf8), (REASON, DataType::Utf8)];
        let bias = [
            (USER_ID, user),
            (PROMPTS, DataType::Int32),
            (FIRST_PLACES, DataType::Int32),
            (FIRST_CHANGED, DataType::Float64),
            (KENDALL_TAU, DataType::Float64),
        ];
        Ok(BTreeMap::from([
            ("reranked".to_owned(), schema(&reranked)),
            ("not_asked".to_owned(), schema(&not_asked)),
            ("order_bias".to_owned(), schema(&bias)),
        ]))
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        match self.calibrated(ctx)? {
            Some(calibrated) => calibrated.ask(ctx).await,
            None => self.ask(ctx).await,
        }
    }
}

impl Rerank {
    /// This stage as a calibration wants it; `None` where the config names none.
    fn calibrated(&self, ctx: &StageContext) -> Result<Option<Rerank>> {
        if self.config.calibration.is_none() {
            return Ok(None);
        }
        let chosen = Calibration::from_bytes(ctx.artifact(CALIBRATION)?.1.file(calibration::FILE)?)?;
        let mut config = self.config.clone();
        config.mode = Mode::parse(&chosen.mode).map_err(|e| e.at(format!("`{}`", calibration::FILE)))?;
        let mut no_weight = false;
        if chosen.a1 == 0.0 {
            ctx.observer.note("the calibration gives the LLM no weight: nobody is asked");
            config.budget = Budget { users: Some(0), ..config.budget };
            config.reuse = None;
            no_weight = true;
        }
        let remote = config.resolve()?;
        Ok(Some(Rerank { config, remote, no_weight, shard: self.shard }))
    }

    /// How many users are asked within a number of tokens.
    async fn within(&self, ctx: &StageContext, tokens: f64) -> Result<u64> {
        let opened = self.open(ctx).await?;
        let maker = self.maker(ctx, opened.chat.as_ref())?;
        let most = self.config.budget.tokens.map_or(tokens, |most| tokens.min(most as f64));
        let budget = Budget { tokens: Some(most as u64), minutes: None, ..self.config.budget };
        let (ledger, earlier) = self.ledgers(ctx, &maker).await?;
        let whom = self.whom(ctx, &opened, &maker, (&ledger, earlier.as_ref()), budget)?;
        Ok(whom.asked.len() as u64)
    }

    async fn ask(&self, ctx: &StageContext) -> Result<StageResult> {
        let opened = self.open(ctx).await?;
        let Opened { prompts, chat, .. } = &opened;
        let maker = self.maker(ctx, chat.as_ref())?;
        if let Some(spec) = &self.remote {
            server::connect(spec, self.config.mode)?;
        }
        let (mut ledger, mut earlier) = self.ledgers(ctx, &maker).await?;
        let settings = maker.settings_digest();
        let mut whom = self.whom(ctx, &opened, &maker, (&ledger, earlier.as_ref()), self.config.budget)?;
        if let Some(shard) = self.shard {
            whom.asked.retain(|user| shard.has(&user.to_string()));
        }
        let mut asked: Vec<(Id, Vec<Question>)> = Vec::with_capacity(whom.asked.len());
        for user in whom.asked {
            let rows = prompts.rows[&user].iter();
            let questions = rows.map(|&row| maker.question(row, &prompts.prompts[row])).collect::<Result<_>>()?;
            asked.push((user, questions));
        }

        let n_questions: usize = asked.iter().map(|(_, q)| q.len()).sum();
        let mut once = HashSet::new();
        let open: Vec<Question> = asked
            .iter()
            .flat_map(|(_, questions)| questions)
            .filter(|q| ledger.get(&q.prompt_digest).is_none() && once.insert(q.prompt_digest.clone()))
            .cloned()
            .collect();
        let answered_before = n_questions - open.len();
        if answered_before > 0 {
            ctx.observer.note(&format!("{answered_before} of {n_questions} prompts were answered before"));
        }
        if !whom.reused.is_empty() {
            ctx.observer.note(&format!("{} users keep an earlier order of the LLM", whom.reused.len()));
        }
        let mut llm_tokens: u64 = open.iter().map(|q| q.tokens as u64).sum();
        let asked_tokens: u64 = open.iter().map(|q| prompts.prompts[q.row].tokens).sum();
        let n_open = open.len();
        let began = std::time::Instant::now();
        let (mut failures, mut counters) = (HashMap::new(), Vec::new());
        match (&self.remote, &chat) {
            (Some(spec), _) => {
                let done = server::ask(&self.config, ctx, (spec, &maker), prompts, open, &mut ledger).await?;
                (failures, counters) = (done.failures, done.counters);
                let counted = |key| counters.iter().find(|(k, _)| *k == key).and_then(|(_, v)| v.as_u64());
                llm_tokens = counted("llm_prompt_tokens").filter(|n| *n > 0).unwrap_or(llm_tokens);
            }
            (None, Some(chat)) => {
                let model = self.config.model.as_deref().unwrap_or_default();
                local::ask(&self.config, ctx, &ctx.model(model)?.path, chat, open, &mut ledger).await?;
            }
            (None, None) => return Err(Error::internal("neither a server nor a model")),
        }
        let seconds = began.elapsed().as_secs_f64();
        ledger.compact().await?;
        if self.shard.is_some() {
            let result =
                counters.into_iter().fold(StageResult::default(), |r, (name, value)| r.with_counter(name, value));
            return Ok(result
                .with_counter("users_asked", asked.len())
                .with_counter("prompts", n_questions)
                .with_counter("prompts_reused", answered_before)
                .with_counter("prompts_failed", failures.len()));
        }

        let mut outcome = orders(prompts, &asked, &ledger, &failures, &settings)?;
        if let Some(earlier) = &mut earlier {
            earlier.append(std::mem::take(&mut outcome.given)).await?;
        }
        let n_reused = whom.reused.len();
        for (user, kept) in whom.reused {
            outcome.reranked.push(&user, kept, "reused");
        }
        let why_left_out = if self.no_weight { NO_WEIGHT } else { "budget" };
        let not_asked = not_asked((&whom.left_out, why_left_out), &outcome.failed, ctx.collect_opt("skipped").await?)?;
        let rate = |n: f64| match n_open {
            0 => serde_json::Value::Null,
            _ => serde_json::json!((n / seconds * 100.0).round() / 100.0),
        };
        let mut result = StageResult::default();
        if let Some((users, changed, tau)) = outcome.bias.means() {
            ctx.observer.note(&format!(
                "in another order of the candidates, another one came first in {:.0}% of the prompts ({users} users, Kendall's tau {tau:.2})",
                100.0 * changed
            ));
            result = result
                .with_counter("order_bias_users", users)
                .with_counter("order_bias_first_changed", (changed * 1e4).round() / 1e4)
                .with_counter("order_bias_kendall_tau", (tau * 1e4).round() / 1e4);
        }
        if !outcome.failed.is_empty() {
            let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
            outcome.failed.iter().for_each(|(_, why)| *reasons.entry(why).or_default() += 1);
            let text: Vec<String> = reasons.iter().map(|(why, n)| format!("{n} {why}")).collect();
            ctx.observer.note(&format!("no answer for {} users: {}", outcome.failed.len(), text.join(", ")));
            // Another run of the same inputs asks them again, and nobody else.
            result = result.with_counter("failures", serde_json::json!(reasons)).with_counter(ASK_AGAIN, true);
        }
        for (name, value) in counters {
            result = result.with_counter(name, value);
        }
        Ok(result
            .with_counter("users_asked", asked.len())
            .with_counter("users_reused", n_reused)
            .with_counter("users_failed", outcome.failed.len())
            .with_counter("users_left_out_by_budget", whom.left_out.len())
            .with_counter("prompts", n_questions)
            .with_counter("prompts_reused", answered_before)
            .with_counter("llm_tokens", llm_tokens)
            .with_counter(ASKED_TOKENS, asked_tokens)
            .with_counter("llm_seconds", (seconds * 1000.0).round() / 1000.0)
            .with_counter("llm_tokens_per_second", rate(llm_tokens as f64))
            .with_counter("prompts_per_second", rate(n_open as f64))
            .with_table("reranked", outcome.reranked.into_table(prompts)?)
            .with_table("not_asked", not_asked)
            .with_table("order_bias", outcome.bias.into_table(prompts)?))
    }

    /// Whether a server needs the chat in the template of a model that is here.
    fn needs_template(&self) -> bool {
        self.config.mode == Mode::Likelihood && self.remote.as_ref().is_some_and(|r| r.dialect != Dialect::Vllm)
    }

    /// Reads the inputs. Keys need the token ids, so the tokenizer is opened too; the weights are loaded only if something
    /// is left to ask.
    async fn open(&self, ctx: &StageContext) -> Result<Opened> {
        let prompts = Prompts::read(&ctx.collect("prompts").await?)?;
        let interactions = interactions_of(&ctx.collect("long_tail").await?)?;
        let chat = match self.models().first() {
            Some(model) => {
                let path = ctx.model(model)?.path.clone();
                Some(tokio::task::spawn_blocking(move || ChatTokenizer::open(&path)).await??)
            }
            None => None,
        };
        Ok(Opened { prompts, interactions, chat })
    }

    /// What was answered before, and which earlier orders may be kept.
    async fn ledgers(&self, ctx: &StageContext, maker: &Maker<'_>) -> Result<(Ledger, Option<Orders>)> {
        let (ledger, unreadable) = Ledger::open(&ctx.savings, &maker.weights).await?;
        if unreadable > 0 {
            ctx.observer
                .note(&format!("{unreadable} unreadable ledger segments skipped; their prompts are asked again"));
        }
        let earlier = match self.config.reuse {
            Some(_) => Some(Orders::open(&ctx.savings, &maker.weights).await?),
            None => None,
        };
        Ok((ledger, earlier))
    }

    fn whom(
        &self,
        ctx: &StageContext,
        opened: &Opened,
        maker: &Maker<'_>,
        (ledger, earlier): (&Ledger, Option<&Orders>),
        budget: Budget,
    ) -> Result<Whom<Kept>> {
        let prompts = &opened.prompts;
        let order = asking_order(prompts, &opened.interactions, self.config.order, ctx.seed);
        let settings = maker.settings_digest();
        divide(prompts, order, budget, |user| self.known(user, prompts, maker, ledger, earlier, &settings))
    }

    fn maker<'a>(&'a self, ctx: &StageContext, chat: Option<&'a ChatTokenizer>) -> Result<Maker<'a>> {
        match (&self.remote, chat) {
            (Some(spec), chat) => Ok(Maker::remote(&self.config, spec, chat)),
            (None, Some(chat)) => {
                let digest = &ctx.model(self.config.model.as_deref().unwrap_or_default())?.digest;
                Ok(Maker::local(&self.config, chat, digest))
            }
            (None, None) => Err(Error::internal("neither a server nor a model")),
        }
    }

    /// What the ledger says of a user.
    fn known(
        &self,
        user: &Id,
        prompts: &Prompts,
        maker: &Maker<'_>,
        ledger: &Ledger,
        earlier: Option<&Orders>,
        settings: &str,
    ) -> Result<Known<Kept>> {
        let (Some(reuse), Some(earlier)) = (self.config.reuse, earlier) else { return Ok(Known::Nothing) };
        let rows = &prompts.rows[user];
        let first = &prompts.prompts[rows[0]];
        let now = chrono::Utc::now().timestamp_micros();
        let young = |asked_at: i64| (now - asked_at) as f64 <= reuse.days * 86_400e6;
        let kept = first
            .history_digest
            .as_deref()
            .and_then(|history| earlier.get(&user.to_string(), history, settings))
            .filter(|order| young(order.asked_at))
            .and_then(|order| Kept::of(order, &shortlist_of(rows, prompts), reuse.overlap));
        let Some(kept) = kept else { return Ok(Known::Nothing) };
        for &row in rows {
            if ledger.get(&maker.question(row, &prompts.prompts[row])?.prompt_digest).is_none() {
                return Ok(Known::Reusable(kept));
            }
        }
        Ok(Known::Answered(Some(kept)))
    }
}

/// The items of a user's prompts, each once, in the recommender's order.
fn shortlist_of(rows: &[usize], prompts: &Prompts) -> Vec<Id> {
    let mut once = HashSet::new();
    let items = rows.iter().flat_map(|&row| prompts.prompts[row].shortlist());
    items.filter(|item| once.insert(item.clone())).collect()
}
