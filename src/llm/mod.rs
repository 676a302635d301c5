//! A language model of the Llama family: formats, tokenizer, decoder, engine, scoring.
//!
//! In: a GGUF file or a Hugging Face folder, and prompts. Out: log-probabilities, orders, ratings and text.
//!
//! [`ChatTokenizer`] turns conversations into ids without loading weights; [`Llm`] holds the
//! weights on a device. Inside, [`weights`] reads either format, a [`decoder::Decoder`] does the
//! arithmetic (`cpu`, or `model` on any Burn back end), and [`engine`] has the modes of asking, all on one [`scheduler`].

pub mod architectures;
pub mod blocks;
pub mod bytes;
pub mod chat;
pub mod config;
pub mod cpu;
pub mod decoder;
pub mod engine;
pub mod gguf;
#[cfg(test)]
mod hostile;
pub mod item;
pub mod ledger;
pub mod model;
pub mod options;
pub mod pack;
pub mod quant;
pub mod radix;
pub mod ranking;
pub mod rating;
pub mod remote;
pub mod rope;
pub mod safetensors;
pub mod scheduler;
pub mod scoring;
pub mod serve;
pub mod template;
pub mod tokenizer;
pub mod trie;
pub mod tune;
pub mod weights;

use std::path::Path;

pub use self::chat::{ChatTokenizer, Message};
pub use self::config::LlamaConfig;
pub use self::cpu::linear::Precision;
pub use self::engine::ScoreRequest;
pub use self::options::{Half, LlmOptions, Memory};
pub use self::ranking::{ListFormat, RankRequest, Ranked};
pub use self::rating::{Rating, RatingScale};
pub use self::serve::serve;

use self::cpu::CpuModel;
use self::cpu::kernels::Isa;
use self::engine::{Engine, Local};
use self::model::{BurnModel, Placement};
use self::tune::LoraFile;
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
struct LoadOn<'a>(&'a Weights, LlmOptions, Placement);

impl OnBackend for LoadOn<'_> {
    type Output = Result<Box<dyn Engine>>;

    fn on<B: ModelBackend>(self, device: &B::Device) -> Self::Output {
        Ok(Box::new(Local::new(BurnModel::<B>::load(self.0, device, self.2)?, self.1)))
    }
}

impl Llm {
    /// Loads a GGUF file or a Hugging Face folder, with the default options.
    ///
    /// A folder without `tokenizer.json` opens too: it can score token ids, and [`Llm::chat`]
    /// refuses conversations.
    ///
    /// # Errors
    /// Exit 65 where a file is missing, damaged or of an unsupported kind, or the parts do not fit
    /// each other; 75 or 78 where the device is not to be had.
    pub fn open(path: &Path, device: DeviceChoice) -> Result<Self> {
        Self::open_with(path, device, LlmOptions::default())
    }

    /// As [`Llm::open`], with options.
    ///
    /// # Errors
    /// As [`Llm::open`].
    pub fn open_with(path: &Path, device: DeviceChoice, options: LlmOptions) -> Result<Self> {
        Self::open_adapted(path, None, device, options)
    }

    /// The same with an adapter, which is added to the weights as they are loaded.
    ///
    /// # Errors
    /// As [`Llm::open`]; exit 65 where the adapter is of another model.
    pub fn open_adapted(
        path: &Path,
        adapter: Option<LoraFile>,
        device: DeviceChoice,
        options: LlmOptions,
    ) -> Result<Self> {
        let opened = device.open()?;
        let chat = ChatTokenizer::open_weights_only(path)?;
        let weights = Weights::open(path)?.with_adapter(adapter)?;
        let engine: Box<dyn Engine> = if matches!(opened.device, Device::Cpu) {
            // Our own arrangement of the same arithmetic; see `cpu/mod.rs`.
            Box::new(Local::new(CpuModel::load_with(&weights, Isa::detect(), options.precision)?, options))
        } else {
            let placement = Placement { half: options.half != Half::Never, gpu: true };
            opened.device.run(LoadOn(&weights, options, placement))?
        };
        Ok(Llm { chat, engine, device: opened.why })
    }

    /// Loads a model on any Burn back end, in f32.
    ///
    /// # Errors
    /// As [`Llm::open`].
    pub fn open_on<B: burn::tensor::backend::Backend>(path: &Path, device: &B::Device) -> Result<Self> {
        Self::open_on_with::<B>(path, device, LlmOptions::default())
    }

    /// As [`Llm::open_on`], with options.
    ///
    /// # Errors
    /// As [`Llm::open`].
    pub fn open_on_with<B: burn::tensor::backend::Backend>(
        path: &Path,
        device: &B::Device,
        options: LlmOptions,
    ) -> Result<Self> {
        let chat = ChatTokenizer::open_weights_only(path)?;
        let placement = Placement { half: options.half == Half::Always, gpu: false };
        let engine = Box::new(Local::new(BurnModel::<B>::load(&Weights::open(path)?, device, placement)?, options));
        Ok(Llm { chat, engine, device: format!("device: {device:?}") })
    }

    /// Loads a model on the CPU with the f32 kernels of a given instruction set.
    ///
    /// # Errors
    /// As [`Llm::open`]; our bug (exit 70) where this machine lacks the instructions.
    pub fn open_cpu(path: &Path, isa: Isa) -> Result<Self> {
        Self::open_cpu_with(path, isa, LlmOptions { precision: Precision::F32, ..LlmOptions::default() })
    }

    /// As [`Llm::open_cpu`], with options.
    ///
    /// # Errors
    /// As [`Llm::open_cpu`].
    pub fn open_cpu_with(path: &Path, isa: Isa, options: LlmOptions) -> Result<Self> {
        if !Isa::available().contains(&isa) {
            return Err(Error::internal(format!("this machine has no {isa:?} instructions")));
        }
        let chat = ChatTokenizer::open_weights_only(path)?;
        let engine = Box::new(Local::new(CpuModel::load_with(&Weights::open(path)?, isa, options.precision)?, options));
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

    /// Bytes that the model takes at most, for any number of prompts of any length up to the context: the result's own
    /// size aside, a call takes no more than this.
    pub fn memory(&self) -> Memory {
        self.engine.memory()
    }

    /// Drops the keys and values of beginnings that earlier calls computed. Results do not depend on it.
    pub fn forget(&self) {
        self.engine.forget();
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

    /// As [`Llm::label_logprobs`], over each prompt's labels in place of the whole vocabulary: the probabilities of its labels
    /// sum to 1, the order of the labels is the same, and the head costs their rows only.
    ///
    /// # Errors
    /// As [`Llm::label_logprobs`].
    pub fn label_logprobs_among(
        &self,
        prompts: &[Vec<u32>],
        labels: &[Vec<u32>],
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Vec<f32>>> {
        self.engine.label_logprobs_among(prompts, labels, progress)
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

    /// The lists that the model writes greedily after prompts, `[requests]`: every candidate once. Whatever the model would like to
    /// say, it can only go on with a candidate that is left; what it writes as the last of several allowed
    /// tokens is not computed. Many lists are written at the same time.
    ///
    /// `progress` counts requests, as in [`Llm::label_logprobs`].
    ///
    /// # Errors
    /// As [`Llm::label_logprobs`]; where a prompt does not fit the context with all its candidates.
    pub fn rank_by_generation(
        &self,
        requests: &[RankRequest],
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Ranked>> {
        self.engine.rank_by_generation(requests, progress)
    }

    /// The ratings that the model gives after prompts, `[prompts]`.
    ///
    /// Where each rating is one token, one read of their logits is enough; else every rating's text is scored, with its
    /// end. Probabilities are over the ratings: whatever else the model would say counts for nothing.
    ///
    /// # Errors
    /// As [`Llm::label_logprobs`]; where a prompt does not fit the context with a rating.
    pub fn rate(
        &self,
        prompts: &[Vec<u32>],
        scale: &RatingScale,
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Rating>> {
        self.engine.rate(prompts, scale, progress)
    }

    /// Mean of the final hidden states (after the last norm) over the tokens of texts, `[texts, hidden]`.
    ///
    /// # Errors
    /// As [`Llm::label_logprobs`], for texts.
    pub fn hidden_means(
        &self,
        texts: &[Vec<u32>],
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Vec<f32>>> {
        self.engine.hidden_means(texts, progress)
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
