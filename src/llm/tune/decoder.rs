//! The decoder that can be learned: the same arithmetic as [`crate::llm::model`], with gradients, over packed examples.
//!
//! In: [`Weights`], of which a prefix of the layers is taken into [`Params`] under their Hugging Face names; then token
//! ids or input embeddings of a [`Packed`] sequence. Out: hidden states `[tokens, hidden]`, or the losses of some positions,
//! so that the vocabulary product is made where a token is learned and nowhere else.
//!
//! Architecture: LLaMA (arXiv 2302.13971) with grouped-query attention, and what Qwen2 and Qwen3 add to it. Reference
//! implementation: transformers, `models/llama/modeling_llama.py`. Deviation: examples lie one after the other without padding, each
//! seeing itself alone with positions from 0; nothing else differs from computing each by itself.
//!
//! ```ignore
//! let mut params = Params::<B>::new(device);
//! let decoder = Decoder::load(&weights, Parts { layers: Some(12), text: false }, &mut params)?;
//! let vars = params.tracked();
//! let packed = decoder.packed(&[17, 40, 3]);                       // three sequences, 60 positions
//! let hidden = decoder.hidden(&Reads::whole(&vars), embeddings, &packed); // [60, hidden]
//! ```

use burn::tensor::backend::Backend;
use burn::tensor::{FloatDType, Int, Tensor, TensorData};

use super::lora::{Adapter, Target};
use crate::error::{Error, Result};
use crate::llm::config::LlamaConfig;
use crate::llm::weights::{EMBEDDING, FINAL_NORM, HEAD, Weights, layer_bias, layer_tensor};
use crate::recommenders::ops::{
    Angles, FusedBackend, Heads, dropout, fixed_cross_entropy, linear_cross_entropy, project, rms_norm, rotary,
    segment_attention, swiglu,
};
use crate::recommenders::optim::{ParamId, Params, Vars};

/// Which parts of a model are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// So many of the first layers; all without.
    pub layers: Option<usize>,
    /// Whether the embedding and the head are wanted: for token ids and losses of tokens.
    pub text: bool,
}

/// A model's shape and where its weights are in some [`Params`].
#[derive(Clone, Debug)]
pub struct Decoder {
    config: LlamaConfig,
    layers: Vec<Layer>,
    embedding: Option<ParamId>,
    /// `None` where the head is the embedding.
    head: Option<ParamId>,
    final_norm: ParamId,
    precision: Option<FloatDType>,
}

/// Weights of one layer.
#[derive(Clone, Debug)]
struct Layer {
    attention_norm: ParamId,
    mlp_norm: ParamId,
    /// By [`Target`].
    linears: Vec<(ParamId, Option<ParamId>)>,
    /// Norms of the heads of queries and keys.
    head_norms: Option<[ParamId; 2]>,
}

/// Gives the values of a tensor, by its name and shape.
pub type MakeWeights<'a> = &'a mut dyn FnMut(&str, &[usize]) -> Result<Vec<f32>>;

/// The weights that a pass reads.
#[derive(Clone, Copy)]
pub struct Reads<'a, B: Backend> {
    /// The model's own.
    pub base: &'a Vars<B>,
    /// Those of an adapter, and which of its inputs are dropped.
    pub adapter: Option<AdapterReads<'a, B>>,
    /// Whether the model's own are learned; else the head's gradient is not computed.
    pub learn_base: bool,
}

/// The weights of an adapter.
#[derive(Clone, Copy)]
pub struct AdapterReads<'a, B: Backend> {
    /// Its shape.
    pub adapter: &'a Adapter,
    /// Its weights.
    pub vars: &'a Vars<B>,
    /// Share of its inputs that is dropped, in `[0, 1)`, and a seed.
    pub dropout: (f32, u64),
}

impl<'a, B: Backend> Reads<'a, B> {
    /// A model without an adapter.
    pub fn whole(base: &'a Vars<B>) -> Self {
        Reads { base, adapter: None, learn_base: true }
    }
}

/// Sequences one after the other.
#[derive(Clone, Debug)]
pub struct Packed {
    segments: Vec<usize>,
    angles: Angles,
}

impl Packed {
    /// All positions.
    pub fn tokens(&self) -> usize {
        self.segments.iter().sum()
    }
}

impl Decoder {
    /// Takes the weights of a model into `params`.
    ///
    /// # Errors
    /// Exit 65 where a tensor cannot be read; 78 where the model has fewer layers than are asked for.
    pub fn load<B: Backend>(weights: &Weights, parts: Parts, params: &mut Params<B>) -> Result<Self> {
        Self::build(weights.config(), parts, params, &mut |name, _| weights.values(name))
    }

    /// A model of that shape with weights from `make(name, shape)`, e.g. random ones.
    ///
    /// # Errors
    /// What `make` returns; exit 78 where the model has fewer layers than are asked for.
    pub fn build<B: Backend>(
        config: &LlamaConfig,
        parts: Parts,
        params: &mut Params<B>,
        make: MakeWeights<'_>,
    ) -> Result<Self> {
        let mut config = config.clone();
        if let Some(layers) = parts.layers {
            if layers == 0 || layers > config.layers {
                return Err(Error::spec(format!("`layers` is {layers}, but the model has {} layers", config.layers)));
            }
            config.layers = layers;
        }
        let c = config.clone();
        let mut add = |name: &str, shape: &[usize]| Ok::<_, Error>(params.add(name, shape, make(name, shape)?));
        let embedding = parts.text.then(|| add(EMBEDDING, &[c.vocab_size, c.hidden])).transpose()?;
        let head = (parts.text && !c.tied).then(|| add(HEAD, &[c.vocab_size, c.hidden])).transpose()?;
        let mut layers = Vec::with_capacity(c.layers);
        for layer in 0..c.layers {
            let mut linears = Vec::with_capacity(Target::ALL.len());
            for target in Target::ALL {
                let [outputs, inputs] = target.shape(&c);
                let weight = add(&layer_tensor(layer, target.leaf()), &[outputs, inputs])?;
                let has = c.qkv_bias && matches!(target, Target::Query | Target::Key | Target::Value);
                let bias = has.then(|| add(&layer_bias(layer, target.leaf()), &[outputs])).transpose()?;
                linears.push((weight, bias));
            }
            let norm = |leaf, add: &mut dyn FnMut(&str, &[usize]) -> Result<ParamId>| {
                add(&layer_tensor(layer, leaf), &[c.head_dim])
            };
            let head_norms = match c.qk_norm {
                false => None,
                true => Some([norm("self_attn.q_norm", &mut add)?, norm("self_attn.k_norm", &mut add)?]),
            };
            layers.push(Layer {
                attention_norm: add(&layer_tensor(layer, "input_layernorm"), &[c.hidden])?,
                mlp_norm: add(&layer_tensor(layer, "post_attention_layernorm"), &[c.hidden])?,
                linears,
                head_norms,
            });
        }
        let final_norm = add(FINAL_NORM, &[c.hidden])?;
        Ok(Decoder { config, layers, embedding, head, final_norm, precision: None })
    }

    /// Products and attention in this type instead of the weights' own (bf16 on a GPU); norms, the residual stream and losses
    /// stay in f32.
    pub fn in_precision(mut self, precision: Option<FloatDType>) -> Self {
        self.precision = precision;
        self
    }

    /// The shape, with as many layers as were taken.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Layers that were taken.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Sequences of these lengths, packed one after the other.
    pub fn packed(&self, lengths: &[usize]) -> Packed {
        let positions: Vec<u32> = lengths.iter().flat_map(|&n| 0..n as u32).collect();
        Packed { segments: lengths.to_vec(), angles: Angles::new(&positions, &self.config.rope_frequencies()) }
    }

    /// Embeddings of tokens, `[tokens, hidden]`.
    ///
    /// # Panics
    /// When the decoder was made without text, or an id is beyond the vocabulary (our bug).
    pub fn embed<B: Backend>(&self, reads: &Reads<'_, B>, ids: &[u32]) -> Tensor<B, 2> {
        assert!(ids.iter().all(|&id| (id as usize) < self.config.vocab_size), "an id beyond the vocabulary");
        let table = reads.base.get::<2>(self.embedding.expect("the decoder has its embedding"));
        let device = table.device();
        table.select(0, indices(ids.iter().map(|&id| id as usize), &device))
    }

    /// Hidden states before the last norm, `[tokens, hidden]`, of input embeddings `[tokens, hidden]`.
    pub fn layers_of<B: FusedBackend>(&self, reads: &Reads<'_, B>, x: Tensor<B, 2>, packed: &Packed) -> Tensor<B, 2> {
        (0..self.layers.len()).fold(x, |x, layer| self.layer(reads, layer, x, packed))
    }

    /// Hidden states after the last norm, `[tokens, hidden]`, of input embeddings `[tokens, hidden]`.
    pub fn hidden<B: FusedBackend>(&self, reads: &Reads<'_, B>, x: Tensor<B, 2>, packed: &Packed) -> Tensor<B, 2> {
        self.norm(reads, self.layers_of(reads, x, packed))
    }

    /// The last norm.
    pub fn norm<B: FusedBackend>(&self, reads: &Reads<'_, B>, x: Tensor<B, 2>) -> Tensor<B, 2> {
        rms_norm(x, reads.base.get(self.final_norm), self.config.rms_eps)
    }

    /// Logits of rows before the last norm, `[rows, vocab]`.
    ///
    /// # Panics
    /// When the decoder was made without text (our bug).
    pub fn logits<B: FusedBackend>(&self, reads: &Reads<'_, B>, x: Tensor<B, 2>) -> Tensor<B, 2> {
        project(self.norm(reads, x), self.head(reads), None)
    }

    fn head<B: Backend>(&self, reads: &Reads<'_, B>) -> Tensor<B, 2> {
        reads.base.get(self.head.or(self.embedding).expect("the decoder has its head"))
    }

    /// Minus the log-probability of each target, `[targets]`: `x [tokens, hidden]` is before the last norm, `positions` are rows of
    /// it that predict the `targets`.
    ///
    /// # Panics
    /// When the decoder was made without text, or shapes do not fit (our bug).
    pub fn losses<B: FusedBackend>(
        &self,
        reads: &Reads<'_, B>,
        x: Tensor<B, 2>,
        positions: &[usize],
        targets: &[u32],
    ) -> Tensor<B, 1> {
        let device = x.device();
        let states = self.norm(reads, x.select(0, indices(positions.iter().copied(), &device)));
        match reads.learn_base {
            true => linear_cross_entropy(states, self.head(reads), None, targets),
            false => fixed_cross_entropy(states, self.head(reads), targets),
        }
    }

    /// One layer: `[tokens, hidden]` in and out.
    pub fn layer<B: FusedBackend>(
        &self,
        reads: &Reads<'_, B>,
        layer: usize,
        x: Tensor<B, 2>,
        packed: &Packed,
    ) -> Tensor<B, 2> {
        let (c, ids) = (&self.config, &self.layers[layer]);
        let linear = |target, x| self.linear(reads, layer, target, x);
        let normed = self.rounded(rms_norm(x.clone(), reads.base.get(ids.attention_norm), c.rms_eps));
        let mut q = linear(Target::Query, normed.clone());
        let mut k = linear(Target::Key, normed.clone());
        let v = linear(Target::Value, normed);
        if let Some([of_q, of_k]) = ids.head_norms {
            q = self.norm_heads(q, reads.base.get(of_q));
            k = self.norm_heads(k, reads.base.get(of_k));
        }
        let (q, k) = (rotary(q, &packed.angles), rotary(k, &packed.angles));
        let heads = Heads { query: c.heads, key: c.kv_heads, size: c.head_dim };
        let mixed = segment_attention(q, k, v, heads, &packed.segments);
        let x = x.add(self.restored(linear(Target::Output, mixed)));
        let normed = self.rounded(rms_norm(x.clone(), reads.base.get(ids.mlp_norm), c.rms_eps));
        let inner = swiglu(linear(Target::Gate, normed.clone()), linear(Target::Up, normed));
        x.add(self.restored(linear(Target::Down, inner)))
    }

    /// A linear layer with what its adapter adds.
    fn linear<B: FusedBackend>(
        &self,
        reads: &Reads<'_, B>,
        layer: usize,
        target: Target,
        x: Tensor<B, 2>,
    ) -> Tensor<B, 2> {
        let (weight, bias) = self.layers[layer].linears[target.number()];
        let bias = bias.map(|bias| self.rounded(reads.base.get::<1>(bias)));
        let y = project(x.clone(), self.rounded(reads.base.get::<2>(weight)), bias);
        let Some(AdapterReads { adapter, vars, dropout: (share, seed) }) = reads.adapter else { return y };
        let Some([a, b]) = adapter.pair(layer, target) else { return y };
        let place = (layer * Target::ALL.len() + target.number()) as u64;
        let x = dropout(x, share, seed ^ place.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        let low = project(x, self.rounded(vars.get::<2>(a)), None);
        y.add(project(low, self.rounded(vars.get::<2>(b)), None).mul_scalar(adapter.scale()))
    }

    /// RMSNorm of every head.
    fn norm_heads<B: FusedBackend>(&self, x: Tensor<B, 2>, scale: Tensor<B, 1>) -> Tensor<B, 2> {
        let ([n, dim], size) = (x.dims(), self.config.head_dim);
        let x = self.restored(x).reshape([n * (dim / size), size]);
        self.rounded(rms_norm(x, scale, self.config.rms_eps).reshape([n, dim]))
    }

    /// In the type of the products.
    fn rounded<B: Backend, const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        match self.precision {
            None => x,
            Some(precision) => x.cast(precision),
        }
    }

    /// In f32 again.
    fn restored<B: Backend, const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        match self.precision {
            None => x,
            Some(_) => x.cast(FloatDType::F32),
        }
    }
}

/// Numbers as an index tensor.
fn indices<B: Backend>(values: impl Iterator<Item = usize>, device: &B::Device) -> Tensor<B, 1, Int> {
    let values: Vec<i32> = values.map(|v| v as i32).collect();
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n]), device)
}
