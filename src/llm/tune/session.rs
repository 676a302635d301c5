//! A whole tuning on whichever device was chosen: weights in, learned weights out, as files.
//!
//! In: a model's file or folder, examples, [`Plan`]. Out: [`Outcome`], the curve and the files of an adapter and of a model.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::FloatDType;
use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::examples::Example;
use super::export::{all_tensors, model_files};
use super::progress::Watch;
use super::run::{Settings, Tuned, run};
use super::{Adapter, Decoder, LoraFile, Parts, Target, Tuner};
use crate::device::{Device, ModelBackend, OnBackend};
use crate::error::{Error, Result};
use crate::llm::weights::Weights;
use crate::recommenders::optim::Params;
use crate::recommenders::trainer::Checkpoints;

/// The type of products and attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// bfloat16, on a GPU; weights, norms, losses and the optimizer stay in 32 bits.
    Bf16,
}

/// A low-rank adapter that is to be learned.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// Rows of A.
    pub rank: usize,
    /// B A is multiplied by alpha / rank.
    pub alpha: f64,
    /// Share of the inputs that is dropped in training.
    pub dropout: f32,
    /// The matrices that it adds to.
    pub targets: Vec<Target>,
}

/// What is learned, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Without one all weights are learned.
    pub lora: Option<Lora>,
    /// Steps, rates, evaluation.
    pub settings: Settings,
    /// Whether layers are computed again for their gradients.
    pub recompute: bool,
    /// The type of the products.
    pub precision: Precision,
    /// Whether a whole model is wanted, the adapter merged into it.
    pub whole_model: bool,
    /// The model's name, for the adapter's configuration.
    pub base: String,
}

/// What a tuning gives.
pub struct Outcome {
    /// The curve.
    pub tuned: Tuned,
    /// Numbers that were learned.
    pub learned: usize,
    /// The adapter in PEFT's format, where one was learned.
    pub adapter: Option<BTreeMap<String, Bytes>>,
    /// The model in transformers' format, where one is wanted.
    pub model: Option<BTreeMap<String, Bytes>>,
}

/// What a tuning may know besides.
pub struct Around<'a> {
    /// Where tensors live.
    pub device: &'a Device,
    /// Progress and stop requests.
    pub watch: &'a dyn Watch,
    /// Where a tuning that was stopped is kept, if anywhere.
    pub checkpoints: Option<&'a dyn Checkpoints>,
}

/// Tunes the model at `path` on examples to learn from and examples held out.
///
/// # Errors
/// Those of [`run`] and of the files; bf16 on a CPU (exit 78).
pub fn tune(path: &Path, examples: (&[Example], &[Example]), plan: &Plan, around: &Around<'_>) -> Result<Outcome> {
    if plan.precision == Precision::Bf16 && matches!(around.device, Device::Cpu) {
        return Err(Error::spec("`precision` is \"bf16\", but the device is the CPU")
            .with_help("leave `precision` out: a CPU computes in 32 bits; bf16 is for `device = \"cuda\"`"));
    }
    around.device.run(Job { path, examples, plan, around })
}

struct Job<'a> {
    path: &'a Path,
    examples: (&'a [Example], &'a [Example]),
    plan: &'a Plan,
    around: &'a Around<'a>,
}

impl OnBackend for Job<'_> {
    type Output = Result<Outcome>;

    fn on<B: ModelBackend>(self, device: &B::Device) -> Result<Outcome> {
        let Job { path, examples, plan, around } = self;
        let weights = Weights::open(path)?;
        let mut base = Params::<B>::new(device);
        let precision = (plan.precision == Precision::Bf16).then_some(FloatDType::BF16);
        let decoder = Decoder::load(&weights, Parts { layers: None, text: true }, &mut base)?.in_precision(precision);
        let adapter = match &plan.lora {
            None => None,
            Some(lora) => {
                let mut params = Params::new(device);
                let shape = (lora.rank, lora.alpha);
                let adapter = Adapter::new(decoder.config(), shape, &lora.targets, plan.settings.seed, &mut params)?;
                Some((adapter, params))
            }
        };
        let dropout = plan.lora.as_ref().map_or(0.0, |lora| lora.dropout);
        let mut tuner = Tuner { decoder, base, adapter, dropout, recompute: plan.recompute };
        let tuned = run(&mut tuner, examples, &plan.settings, around.watch, around.checkpoints)?;
        let (learned, tensors, config) =
            (tuner.learned().numbers(), tuner.learned().tensors(), tuner.decoder.config().clone());
        drop(tuner);
        let mut outcome = Outcome { tuned, learned, adapter: None, model: None };
        let whole = |tensors: &[_]| model_files(&config, tensors, path);
        match &plan.lora {
            None => outcome.model = Some(whole(&tensors)?),
            Some(lora) => {
                let file = LoraFile::of_tensors(lora.rank, lora.alpha, tensors)?;
                outcome.adapter = Some(file.to_files(&plan.base, lora.dropout)?);
                if plan.whole_model {
                    outcome.model = Some(whole(&all_tensors(&weights.with_adapter(Some(file))?)?)?);
                }
            }
        }
        Ok(outcome)
    }
}
