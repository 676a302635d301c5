//! A language model of the Llama family: formats, tokenizer, decoder, engine, scoring.
//!
//! In: a GGUF file or a Hugging Face folder, and prompts. Out: log-probabilities and text.
//!
//! [`ChatTokenizer`] turns conversations into ids without loading weights; [`Llm`] holds the
//! weights on a device. Inside, [`weights`] reads either format, a [`decoder::Decoder`] does the
//! arithmetic (`cpu`, or `model` on any Burn back end), and [`engine`] schedules prompts over it.

pub mod architectures;
pub mod bytes;
pub mod chat;
pub mod config;
pub mod cpu;
pub mod decoder;
pub mod engine;
pub mod gguf;
#[cfg(test)]
mod hostile;
pub mod ledger;
pub mod model;
pub mod pack;
pub mod quant;
pub mod rope;
pub mod safetensors;
pub mod scoring;
pub mod serve;
pub mod template;
pub mod tokenizer;
pub mod weights;

use std::path::Path;

pub use self::chat::{ChatTokenizer, Message};
pub use self::config::LlamaConfig;
pub use self::engine::ScoreRequest;
pub use self::serve::serve;

use self::cpu::CpuModel;
use self::cpu::kernels::Isa;
use self::engine::Engine;
use self::model::BurnModel;
use self::weights::Weights;
use crate::device::{Device, DeviceChoice, ModelBackend, OnBackend};
use crate::error::{Error, Result};

/// A model with its weights on a device.
pub struct Llm {
    chat: ChatTokenizer,
    engine: Box<dyn Engine>,
    device: String,
}

/// Loads weights onto a back end that was chosen at run time.
struct LoadOn<'a>(&'a Weights);

impl OnBackend for LoadOn<'_> {
    type Output = Result<Box<dyn Engine>>;

    fn on<B: ModelBackend>(self, device: &B::Device) -> Self::Output {
        Ok(Box::new(BurnModel::<B>::load(self.0, device)?))
    }
}

impl Llm {
    /// Loads a GGUF file or a Hugging Face folder.
    ///
    /// A folder without `tokenizer.json` opens too: it can score token ids, and [`Llm::chat`]
    /// refuses conversations.
    ///
    /// # Errors
    /// Exit 65 where a file is missing, damaged or of an unsupported kind, or the parts do not fit
    /// each other; 75 or 78 where the device is not to be had.
    pub fn open(path: &Path, device: DeviceChoice) -> Result<Self> {
        let opened = device.open()?;
        let chat = ChatTokenizer::open_weights_only(path)?;
        let weights = Weights::open(path)?;
        let engine: Box<dyn Engine> = if matches!(opened.device, Device::Cpu) {
            // Our own arrangement of the same arithmetic; see `cpu/mod.rs`.
            Box::new(CpuModel::load(&weights, Isa::detect())?)
        } else {
            opened.device.run(LoadOn(&weights))?
        };
        Ok(Llm { chat, engine, device: opened.why })
    }

    /// Loads a model on any Burn back end.
    ///
    /// # Errors
    /// As [`Llm::open`].
    pub fn open_on<B: burn::tensor::backend::Backend>(path: &Path, device: &B::Device) -> Result<Self> {
        let chat = ChatTokenizer::open_weights_only(path)?;
        let engine = Box::new(BurnModel::<B>::load(&Weights::open(path)?, device)?);
        Ok(Llm { chat, engine, device: format!("device: {device:?}") })
    }

    /// Loads a model on the CPU with the kernels of a given instruction set.
    ///
    /// # Errors
    /// As [`Llm::open`]; our bug (exit 70) where this machine lacks the instructions.
    pub fn open_cpu(path: &Path, isa: Isa) -> Result<Self> {
        if !Isa::available().contains(&isa) {
            return Err(Error::internal(format!("this machine has no {isa:?} instructions")));
        }
        let chat = ChatTokenizer::open_weights_only(path)?;
        let engine = Box::new(CpuModel::load(&Weights::open(path)?, isa)?);
        Ok(Llm { chat, engine, device: format!("device: cpu ({isa:?})") })
    }

    /// Tokenizer and chat template.
    pub fn chat(&self) -> &ChatTokenizer {
        &self.chat
    }

    /// One line for the log: the device and why it was chosen.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// The shape of the model.
    pub fn config(&self) -> &LlamaConfig {
        self.engine.config()
    }

    /// Log-probabilities of one-token labels after prompts: `prompts` `[n]` of token ids, `labels`
    /// `[n]` of label ids; returns `[n]` of one number per label, natural logarithms over the whole vocabulary.
    ///
    /// `progress` is called with the number of prompts that were finished since its last call.
    /// Prompts may be computed in another order than they came, and in batches; the numbers do not depend on it.
    ///
    /// # Errors
    /// Exit 65 where a prompt is empty, longer than the context, or has ids beyond the vocabulary; what `progress` gives.
    pub fn label_logprobs(
        &self,
        prompts: &[Vec<u32>],
        labels: &[Vec<u32>],
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Vec<f32>>> {
        self.engine.label_logprobs(prompts, labels, progress)
    }

    /// The likeliest token after each prompt, `[n]`; the smallest id of equal ones.
    ///
    /// # Errors
    /// As [`Llm::label_logprobs`].
    pub fn next_tokens(&self, prompts: &[Vec<u32>], progress: &mut dyn FnMut(usize) -> Result<()>) -> Result<Vec<u32>> {
        self.engine.next_tokens(prompts, progress)
    }

    /// Log-probabilities of each token of continuations, given the prompt and the tokens before it:
    /// `[requests][continuations][tokens]`. The prompt is computed once for all its continuations.
    ///
    /// `progress` counts requests, as in [`Llm::label_logprobs`].
    ///
    /// # Errors
    /// As [`Llm::label_logprobs`]; an empty continuation too.
    pub fn continuation_logprobs(
        &self,
        requests: &[ScoreRequest],
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Vec<Vec<f32>>>> {
        self.engine.continuation_logprobs(requests, progress)
    }

    /// Greedy continuation of a prompt: up to `max_new` ids, ending with the first of `stop` where one comes.
    ///
    /// # Errors
    /// Exit 65 where the prompt is empty, has ids beyond the vocabulary, or does not fit the context with `max_new`.
    pub fn generate(&self, prompt: &[u32], max_new: usize, stop: &[u32]) -> Result<Vec<u32>> {
        self.engine.generate(prompt, max_new, stop)
    }

    /// Logits after a prompt, `[vocab]`.
    ///
    /// # Errors
    /// As [`Llm::generate`].
    pub fn logits(&self, ids: &[u32]) -> Result<Vec<f32>> {
        self.engine.logits(ids)
    }
}
