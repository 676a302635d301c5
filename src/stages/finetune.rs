//! `finetune`: tunes an LLM on instructions or on lists of titles.
//!
//! In: `examples` (of an `instruct` stage) or `histories` (titles per user). Out: artifact `model`, a Hugging Face folder; with LoRA
//! artifact `adapter` in PEFT's format; table `curve`. The work is in [`crate::llm::tune`]; here tables become examples
//! ([`examples`]).

mod examples;
mod progress;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{Float64Array, Int32Array, Int64Array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::examples::{Examples, Tables};
use self::progress::TuneProgress;
use super::context::{
    Artifact, Cancel, InputSlot, Observer, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What,
};
use super::registry::StageKind;
use super::train::checkpoint_every;
use super::train::savings::{Savings, key_of};
use crate::columns::{PROMPT, RESPONSE, SPLIT, SYSTEM, TITLE, USER_ID};
use crate::device::DeviceChoice;
use crate::error::{Error, Result};
use crate::llm::ChatTokenizer;
use crate::llm::tune::progress::Point;
use crate::llm::tune::session::{Around, Lora, Outcome, Plan, Precision, tune};
use crate::llm::tune::{Settings, Target};
use crate::tables::Table;

/// `kind = "finetune"`.
pub const KIND: StageKind = StageKind {
    name: "finetune",
    version: 1,
    about: "Tunes an LLM on instructions, all of its weights or a low-rank adapter.",
    sample: "model = \"smollm2-135m-instruct\"\nexamples = \"instructions\"\nmethod = \"lora\"\nrank = 8\nsteps = 100\n",
    schema: || schemars::schema_for!(FinetuneConfig),
    resolve,
};

/// What is learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// A low-rank adapter (arXiv 2106.09685); the model's own weights stay.
    #[default]
    Lora,
    /// All weights, as in the paper. Takes 16 bytes a parameter, and activations.
    Full,
}

/// What a tuned model is to predict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// The responses of instructions, given the prompts.
    #[default]
    Response,
    /// Every title of a user's time-ordered list but the first, given those before it: far more learned tokens per token that is
    /// read.
    Titles,
}

/// Tunes an LLM on instructions (section 4.5): cross-entropy on the tokens of the responses only, or with `objective = "titles"` on
/// lists of titles. Weights are learned by AdamW; the learning rate rises for `warmup_steps` steps and falls to 0 along half a cosine.
/// Examples are packed one after the other without padding, and see themselves only.
///
/// `model = "STAGE.model"` in `prompt` and `rerank` uses what was tuned here. With LoRA that is the base with the adapter merged into
/// it; the adapter itself is the output `adapter`, which `peft` loads.
///
/// A tuning that was stopped goes on from its last checkpoint when the same command runs again, with the same curve as one that was not.
///
/// Counters: `examples`, `held_out_examples`, `too_long` (left out for `max_tokens`), `tokens` and `learned_tokens` (of one pass over
/// the examples), `steps`, `step` (that the weights are of), `parameters` (that are learned), `loss` (of the last step),
/// `held_out_before` and `held_out_after` (mean loss per learned token of held-out examples), `tokens_per_second`, `device`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FinetuneConfig {
    /// The LLM: a name from the catalogue, a GGUF file, a Hugging Face folder, or the `model` output of another stage of this kind.
    pub model: String,
    /// Instructions, of an `instruct` stage: `system`, `prompt`, `response` and `split`. Rows whose `split` is `held-out` are never
    /// learned; the loss on them is measured. With `objective = "titles"` only those are read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub examples: Option<String>,
    /// With `objective = "titles"`: `user_id` and `title`, one row per interaction, oldest first within a user. Without `examples` every
    /// 20th user, by a hash of the seed, is held out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub histories: Option<String>,
    /// What is predicted.
    #[serde(default)]
    pub objective: Objective,
    /// What is learned.
    #[serde(default)]
    pub method: Method,
    /// LoRA: rank of the adapter's matrices; default 8.
    #[serde(default = "default_rank")]
    #[schemars(range(min = 1))]
    pub rank: usize,
    /// LoRA: the adapter is scaled by `alpha / rank`; default 16.
    #[serde(default = "default_alpha")]
    pub alpha: f64,
    /// LoRA: share of the adapter's inputs that is dropped in training; default 0.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 0.9))]
    pub dropout: f32,
    /// LoRA: the matrices of each layer that have an adapter, of `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`,
    /// `down_proj`; default all.
    #[serde(default = "default_targets")]
    pub targets: Vec<String>,
    /// LoRA: whether the output `model` is wanted, the base with the adapter merged into it, 4 bytes a parameter; default true.
    #[serde(default = "yes")]
    pub merge: bool,
    /// Peak of the learning rate; default 2e-5 (the paper's) for all weights, 2e-4 for an adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub learning_rate: Option<f64>,
    /// Passes over the examples; default 3, as in the paper.
    #[serde(default = "default_epochs")]
    #[schemars(range(min = 0))]
    pub epochs: usize,
    /// Steps in all, in place of `epochs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<usize>,
    /// Tokens that go through the model in all, in place of `epochs`: as many steps as that makes at the examples' mean length. For
    /// comparisons at equal work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Examples of a batch; default 16, as in the paper.
    #[serde(default = "default_batch")]
    #[schemars(range(min = 1))]
    pub batch: usize,
    /// Batches whose gradients are summed up for one step; default 1.
    #[serde(default = "one")]
    #[schemars(range(min = 1))]
    pub accumulation: usize,
    /// Steps until the learning rate's peak; default 50, as in the paper, but a tenth of all steps at most.
    #[serde(default = "default_warmup")]
    pub warmup_steps: usize,
    /// Decoupled weight decay; default .01.
    #[serde(default = "default_decay")]
    #[schemars(range(min = 0.0))]
    pub weight_decay: f64,
    /// Gradients are clipped to this norm, all weights together; default 1, 0 for none.
    #[serde(default = "default_clip")]
    #[schemars(range(min = 0.0))]
    pub clip: f64,
    /// Tokens of an example at most; default 2048 (the paper's), and never more than the model's context. Longer instructions are left
    /// out and counted, longer lists of titles are cut into several.
    #[serde(default = "default_max_tokens")]
    #[schemars(range(min = 1))]
    pub max_tokens: usize,
    /// Tokens that are computed at once; default 2048. Activations take memory in proportion (1.3 MB a token of a model of 135 million
    /// parameters); results depend on it by rounding only.
    #[serde(default = "default_max_tokens")]
    #[schemars(range(min = 1))]
    pub pack_tokens: usize,
    /// Whether each layer is computed again for its gradient: a third more work, and only the layers' inputs are kept.
    #[serde(default)]
    pub recompute: bool,
    /// Type of the products and of attention: `f32`, or on a GPU `bf16`. Weights and the optimizer are f32 in either case.
    #[serde(default)]
    pub precision: Precision,
    /// Steps from one measurement of the held-out examples to the next; default 0: before the first step and after the last.
    #[serde(default)]
    pub eval_every: usize,
    /// Measurements without a gain until tuning stops; the best weights are kept then. Left out, all steps are taken and the last weights
    /// kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub patience: Option<usize>,
    /// With `objective = "titles"`: what the list is the answer to.
    #[serde(default = "default_titles_prompt")]
    pub titles_prompt: String,
    /// Seconds of work that a stopped run may lose; default 300. Writing checkpoints takes at most a fiftieth of the time.
    #[serde(default = "default_checkpoint_seconds")]
    #[schemars(range(min = 0.0))]
    pub checkpoint_seconds: f64,
}

fn default_rank() -> usize {
    8
}
fn default_alpha() -> f64 {
    16.0
}
fn default_targets() -> Vec<String> {
    Target::ALL.iter().map(|t| t.name().to_owned()).collect()
}
fn yes() -> bool {
    true
}
fn default_epochs() -> usize {
    3
}
fn default_batch() -> usize {
    16
}
fn one() -> usize {
    1
}
fn default_warmup() -> usize {
    50
}
fn default_decay() -> f64 {
    0.01
}
fn default_clip() -> f64 {
    1.0
}
fn default_max_tokens() -> usize {
    2048
}
fn default_titles_prompt() -> String {
    "List what a user chose, oldest first, one title a line.".to_owned()
}
fn default_checkpoint_seconds() -> f64 {
    300.0
}

impl FinetuneConfig {
    fn check(&self) -> Result<()> {
        for (key, value) in [
            ("rank", self.rank),
            ("batch", self.batch),
            ("accumulation", self.accumulation),
            ("max_tokens", self.max_tokens),
            ("pack_tokens", self.pack_tokens),
            ("patience", self.patience.unwrap_or(1)),
        ] {
            if value == 0 {
                return Err(Error::spec(format!("`{key}` is 0; it must be at least 1")));
            }
        }
        if !(0.0..=0.9).contains(&self.dropout) {
            return Err(Error::spec(format!("`dropout` is {}; it must be between 0 and .9", self.dropout)));
        }
        for (key, value) in [("weight_decay", self.weight_decay), ("clip", self.clip), ("learning_rate", self.rate())] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(Error::spec(format!("`{key}` is {value}; it must be a number, 0 or more")));
            }
        }
        if self.steps.is_some() && self.tokens.is_some() {
            return Err(Error::spec("`steps` and `tokens` both say how long to tune").with_help("remove one of them"));
        }
        match (self.objective, &self.examples, &self.histories) {
            (Objective::Response, None, _) => Err(Error::spec("the objective `response` needs `examples`")
                .with_help("name the output `instructions` of an `instruct` stage")),
            (Objective::Response, _, Some(_)) => {
                Err(Error::spec("`histories` is read by `objective = \"titles\"` only")
                    .with_help("remove it, or set the objective"))
            }
            (Objective::Titles, _, None) => Err(Error::spec("the objective `titles` needs `histories`")
                .with_help("name a table with `user_id` and `title`, oldest first within a user")),
            _ => Ok(()),
        }
    }

    fn rate(&self) -> f64 {
        self.learning_rate.unwrap_or(if self.method == Method::Full { 2e-5 } else { 2e-4 })
    }

    /// Examples of a step.
    fn per_step(&self) -> usize {
        self.batch.saturating_mul(self.accumulation)
    }

    fn lora(&self) -> Result<Option<Lora>> {
        let targets = self.targets.iter().map(|name| Target::named(name)).collect::<Result<Vec<_>>>()?;
        if targets.is_empty() {
            return Err(Error::spec("`targets` is empty").with_help("name at least one matrix, or remove the key"));
        }
        let lora = Lora { rank: self.rank, alpha: self.alpha, dropout: self.dropout, targets };
        Ok((self.method == Method::Lora).then_some(lora))
    }

    fn settings(&self, examples: &Examples, seed: u64) -> Settings {
        let n = examples.train.len();
        let steps = match (self.steps, self.tokens) {
            (Some(steps), _) => steps,
            (None, Some(tokens)) => {
                let all: usize = examples.train.iter().map(|e| e.inputs()).sum();
                let of_step = all as f64 * self.per_step().min(n) as f64 / n.max(1) as f64;
                (tokens as f64 / of_step.max(1.0)).round() as usize
            }
            (None, None) => Settings::steps_of(self.epochs, n, self.per_step()),
        };
        Settings {
            steps,
            batch: self.per_step(),
            learning_rate: self.rate(),
            warmup: self.warmup_steps.min(steps / 10),
            decay: self.weight_decay,
            clip: (self.clip > 0.0).then_some(self.clip),
            pack_tokens: self.pack_tokens,
            eval_every: self.eval_every,
            patience: self.patience,
            seed,
        }
    }
}

fn resolve(value: Value, _: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: FinetuneConfig =
        serde_json::from_value(value).map_err(|e| Error::spec("the config of `finetune` is wrong").because(e))?;
    config.check()?;
    config.lora()?;
    let every = checkpoint_every(config.checkpoint_seconds)?;
    Ok(Box::new(Finetune { config, every }))
}

struct Finetune {
    config: FinetuneConfig,
    every: Duration,
}

impl Finetune {
    fn has_model(&self) -> bool {
        self.config.method == Method::Full || self.config.merge
    }
}

#[async_trait]
impl Stage for Finetune {
    fn inputs(&self) -> Vec<InputSlot> {
        let examples = [SYSTEM, PROMPT, RESPONSE, SPLIT].as_slice();
        let slots = [
            self.config.examples.as_ref().map(|r| InputSlot::table("examples", r, examples)),
            self.config.histories.as_ref().map(|r| InputSlot::table("histories", r, &[USER_ID, TITLE])),
        ];
        slots.into_iter().flatten().collect()
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        let mut outputs = Vec::new();
        if self.has_model() {
            outputs.push(OutputSlot {
                name: "model",
                what: What::Artifact,
                about: "The tuned model as a Hugging Face folder: `config.json`, `model.safetensors` (f32), tokenizer, chat template.",
            });
        }
        if self.config.method == Method::Lora {
            outputs.push(OutputSlot {
                name: "adapter",
                what: What::Artifact,
                about: "The adapter in PEFT's format: `adapter_config.json`, `adapter_model.safetensors`.",
            });
        }
        outputs.push(OutputSlot {
            name: "curve",
            what: What::Table,
            about: "`step`, `loss` (before the step), `held_out_loss` (after it), `learning_rate`, `gradient_norm`, `tokens`, `seconds`.",
        });
        outputs
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

    async fn plan_schemas(&self, _: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        Ok(BTreeMap::from([("curve".to_owned(), curve_schema())]))
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        let tables =
            Tables { examples: ctx.collect_opt("examples").await?, histories: ctx.collect_opt("histories").await? };
        let model = ctx.model(&self.config.model)?;
        let key = json!({
            "version": KIND.version, "config": self.identity(), "model": model.digest, "seed": ctx.seed,
        });
        let work = Work {
            config: self.config.clone(),
            whole_model: self.has_model(),
            path: model.path.clone(),
            key,
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
    config: FinetuneConfig,
    whole_model: bool,
    path: PathBuf,
    key: Value,
    device: DeviceChoice,
    seed: u64,
    savings: Savings,
    every: Duration,
    observer: Arc<dyn Observer>,
    cancel: Cancel,
}

impl Work {
    fn run(mut self, tables: &Tables) -> Result<StageResult> {
        let chat = ChatTokenizer::open(&self.path)?;
        let examples = Examples::read(tables, &self.config, &chat, self.seed, &self.cancel)?;
        if examples.too_long > 0 {
            let n = examples.too_long;
            self.observer.note(&format!("{n} examples are longer than `max_tokens` and left out"));
        }
        let opened = self.device.open()?;
        self.observer.note(&opened.why);
        let settings = self.config.settings(&examples, self.seed);
        self.key["examples"] = json!(examples.digest());
        let plan = Plan {
            lora: self.config.lora()?,
            settings,
            recompute: self.config.recompute,
            precision: self.config.precision,
            whole_model: self.whole_model,
            base: self.config.model.clone(),
        };
        let watch = TuneProgress::new(self.observer.clone(), self.cancel.clone());
        let checkpoints = self.savings.checkpoints(&key_of(&self.key), self.every);
        let around = Around { device: &opened.device, watch: &watch, checkpoints: Some(&checkpoints) };
        let outcome = tune(&self.path, (&examples.train, &examples.held_out), &plan, &around)?;
        checkpoints.clear()?;
        self.result(outcome, &examples, opened.device.name())
    }

    fn result(&self, outcome: Outcome, examples: &Examples, device: &str) -> Result<StageResult> {
        let curve = &outcome.tuned.curve;
        let (first, last) = (curve.first(), curve.last());
        let kept = curve.iter().find(|p| p.step == outcome.tuned.step).and_then(|p| p.held_out);
        let of = |p: Option<&Point>, value: fn(&Point) -> Option<f64>| p.and_then(value);
        if let (Some(before), Some(after)) = (of(first, |p| p.held_out), kept) {
            self.observer.note(&format!("loss on held-out examples {before:.4} before, {after:.4} after"));
        }
        let seconds = first.zip(last).map_or(0.0, |(first, last)| last.seconds - first.seconds);
        let speed = last.filter(|_| seconds > 0.0).map(|p| p.tokens as f64 / seconds);
        let counters = [
            ("examples", json!(examples.train.len())),
            ("held_out_examples", json!(examples.held_out.len())),
            ("too_long", json!(examples.too_long)),
            ("tokens", json!(examples.train.iter().map(|e| e.inputs()).sum::<usize>())),
            ("learned_tokens", json!(examples.train.iter().map(|e| e.targets()).sum::<usize>())),
            ("steps", json!(last.map_or(0, |p| p.step))),
            ("step", json!(outcome.tuned.step)),
            ("parameters", json!(outcome.learned)),
            ("loss", json!(of(last, |p| p.loss))),
            ("held_out_before", json!(of(first, |p| p.held_out))),
            ("held_out_after", json!(kept)),
            ("tokens_per_second", json!(speed)),
            ("device", json!(device)),
        ];
        let mut result = StageResult::default().with_table("curve", curve_table(curve)?);
        for (name, files) in [("model", outcome.model), ("adapter", outcome.adapter)] {
            if let Some(files) = files {
                result = result.with_artifact(name, Artifact { files });
            }
        }
        Ok(counters.into_iter().fold(result, |result, (name, value)| result.with_counter(name, value)))
    }
}

fn curve_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("step", DataType::Int32, false),
        Field::new("loss", DataType::Float64, true),
        Field::new("held_out_loss", DataType::Float64, true),
        Field::new("learning_rate", DataType::Float64, false),
        Field::new("gradient_norm", DataType::Float64, false),
        Field::new("tokens", DataType::Int64, false),
        Field::new("seconds", DataType::Float64, false),
    ]))
}

fn curve_table(curve: &[Point]) -> Result<Table> {
    let floats = |f: fn(&Point) -> f64| Arc::new(Float64Array::from_iter_values(curve.iter().map(f)));
    Table::from_columns(vec![
        ("step", Arc::new(Int32Array::from_iter_values(curve.iter().map(|p| p.step as i32))), false),
        ("loss", Arc::new(curve.iter().map(|p| p.loss).collect::<Float64Array>()), true),
        ("held_out_loss", Arc::new(curve.iter().map(|p| p.held_out).collect::<Float64Array>()), true),
        ("learning_rate", floats(|p| p.rate), false),
        ("gradient_norm", floats(|p| p.norm), false),
        ("tokens", Arc::new(Int64Array::from_iter_values(curve.iter().map(|p| p.tokens as i64))), false),
        ("seconds", floats(|p| p.seconds), false),
    ])
}
