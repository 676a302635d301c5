//! The Llama-like decoder on any Burn back end.
//!
//! Architecture: LLaMA (arXiv 2302.13971) with grouped-query attention (arXiv 2305.13245): per
//! layer RMSNorm, attention with rotary positions (arXiv 2104.09864, halves rotated as in Hugging
//! Face's `modeling_llama.py`), RMSNorm, SwiGLU; residual connections around both; biases (Qwen2)
//! and norms of heads (Qwen3) where the configuration has them. Reference implementation: transformers,
//! `models/{llama,qwen2,qwen3}/modeling_*.py`.
//!
//! Where we deviate: a batch is one row of tokens with a mask that says which token sees which
//! ([`Pack`]), not a padded rectangle; and the head runs on the rows that are read only.

use burn::tensor::activation::{silu, softmax};
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};

use super::config::LlamaConfig;
use super::decoder::Decoder;
use super::pack::Pack;
use super::weights::{EMBEDDING, FINAL_NORM, HEAD, Weights, layer_bias, layer_tensor};
use crate::error::{Error, Result};

/// Rows of logits that are brought to the host at once.
const HEAD_ROWS: usize = 64;

/// Weights of one layer; matrices are `[in, out]`.
struct Layer<B: Backend> {
    /// `[hidden]`.
    attention_norm: Tensor<B, 1>,
    /// `[hidden, q_width]`.
    query: Tensor<B, 2>,
    /// `[hidden, kv_width]`.
    key: Tensor<B, 2>,
    /// `[hidden, kv_width]`.
    value: Tensor<B, 2>,
    /// Biases of the three, `[q_width]` and `[kv_width]` twice, where the model has them.
    bias: Option<[Tensor<B, 1>; 3]>,
    /// Weights of the norms of query and key heads, `[head_dim]` each, where the model has them.
    head_norms: Option<[Tensor<B, 1>; 2]>,
    /// `[q_width, hidden]`.
    output: Tensor<B, 2>,
    /// `[hidden]`.
    mlp_norm: Tensor<B, 1>,
    /// `[hidden, intermediate]`.
    gate: Tensor<B, 2>,
    /// `[hidden, intermediate]`.
    up: Tensor<B, 2>,
    /// `[intermediate, hidden]`.
    down: Tensor<B, 2>,
}

/// A model whose weights are tensors of `B`.
pub struct BurnModel<B: Backend> {
    config: LlamaConfig,
    device: B::Device,
    /// `[vocab, hidden]`.
    embedding: Tensor<B, 2>,
    layers: Vec<Layer<B>>,
    /// `[hidden]`.
    final_norm: Tensor<B, 1>,
    /// `[hidden, vocab]`.
    head: Tensor<B, 2>,
}

/// Keys and values per layer, `[kv_heads, len, head_dim]` each; `None` before the first token.
pub struct Cache<B: Backend> {
    len: usize,
    layers: Vec<Option<(Tensor<B, 3>, Tensor<B, 3>)>>,
}

/// What all layers of one pass share.
struct Pass<B: Backend> {
    /// `[tokens, 1, head_dim / 2]`.
    cos: Tensor<B, 3>,
    /// `[tokens, 1, head_dim / 2]`.
    sin: Tensor<B, 3>,
    /// 0 where a token sees another, negative infinity elsewhere: `[1, group tokens, past + tokens]`,
    /// once for each query head of a group.
    mask: Tensor<B, 3>,
}

impl<B: Backend> BurnModel<B> {
    /// Loads weights onto a device.
    ///
    /// # Errors
    /// Exit 65 where a tensor cannot be read.
    pub fn load(weights: &Weights, device: &B::Device) -> Result<Self> {
        let c = weights.config().clone();
        let vector = |name: &str| -> Result<Tensor<B, 1>> {
            let values = weights.values(name)?;
            let n = values.len();
            Ok(Tensor::from_data(TensorData::new(values, [n]), device))
        };
        let rows = |name: &str, out: usize, width: usize| -> Result<Tensor<B, 2>> {
            Ok(Tensor::from_data(TensorData::new(weights.values(name)?, [out, width]), device))
        };
        let layer = |i: usize| -> Result<Layer<B>> {
            let norm = |leaf: &str| vector(&layer_tensor(i, leaf));
            let bias = |leaf: &str| vector(&layer_bias(i, leaf));
            let biases =
                || Ok::<_, Error>([bias("self_attn.q_proj")?, bias("self_attn.k_proj")?, bias("self_attn.v_proj")?]);
            let head_norms = || Ok::<_, Error>([norm("self_attn.q_norm")?, norm("self_attn.k_norm")?]);
            let matrix = |leaf: &str, out, width| rows(&layer_tensor(i, leaf), out, width).map(Tensor::transpose);
            Ok(Layer {
                attention_norm: norm("input_layernorm")?,
                query: matrix("self_attn.q_proj", c.q_width(), c.hidden)?,
                key: matrix("self_attn.k_proj", c.kv_width(), c.hidden)?,
                value: matrix("self_attn.v_proj", c.kv_width(), c.hidden)?,
                bias: c.qkv_bias.then(biases).transpose()?,
                head_norms: c.qk_norm.then(head_norms).transpose()?,
                output: matrix("self_attn.o_proj", c.hidden, c.q_width())?,
                mlp_norm: norm("post_attention_layernorm")?,
                gate: matrix("mlp.gate_proj", c.intermediate, c.hidden)?,
                up: matrix("mlp.up_proj", c.intermediate, c.hidden)?,
                down: matrix("mlp.down_proj", c.hidden, c.intermediate)?,
            })
        };
        let layers = (0..c.layers).map(layer).collect::<Result<Vec<_>>>()?;
        let embedding = rows(EMBEDDING, c.vocab_size, c.hidden)?;
        let head = if c.tied { embedding.clone() } else { rows(HEAD, c.vocab_size, c.hidden)? };
        let final_norm = vector(FINAL_NORM)?;
        Ok(BurnModel { device: device.clone(), embedding, layers, final_norm, head: head.transpose(), config: c })
    }

    /// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension: rows `[tokens, hidden]`, heads `[tokens, heads, head_dim]`.
    fn rms_norm<const D: usize>(&self, x: Tensor<B, D>, weight: &Tensor<B, 1>) -> Tensor<B, D> {
        let mean_square = x.clone().powi_scalar(2).mean_dim(D - 1);
        let scale = mean_square.add_scalar(self.config.rms_eps).sqrt().recip();
        x.mul(scale).mul(weight.clone().unsqueeze())
    }

    /// Positions and mask of a pack that continues `past` tokens.
    fn pass(&self, pack: &Pack, past: usize) -> Pass<B> {
        let c = &self.config;
        let (tokens, half) = (pack.ids.len(), c.head_dim / 2);
        let frequencies = c.rope_frequencies();
        let mut angles = vec![0f32; tokens * half];
        let mut sees = vec![f32::NEG_INFINITY; tokens * (past + tokens)];
        for run in &pack.runs {
            for t in 0..run.len {
                let at = run.start + t;
                let position = (past + run.position + t) as f32;
                for (angle, f) in angles[at * half..].iter_mut().zip(&frequencies) {
                    *angle = position * f;
                }
                let row = &mut sees[at * (past + tokens)..(at + 1) * (past + tokens)];
                row[..past].fill(0.0);
                let fresh = &mut row[past..];
                for parent in run.parents.iter().map(|p| &pack.runs[*p]) {
                    fresh[parent.start..parent.start + parent.len].fill(0.0);
                }
                fresh[run.start..=at].fill(0.0);
            }
        }
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|a| f(f64::from(*a)) as f32).collect();
            Tensor::from_data(TensorData::new(values, [tokens, 1, half]), &self.device)
        };
        let mask = Tensor::<B, 3>::from_data(TensorData::new(sees, [1, tokens, past + tokens]), &self.device);
        Pass { cos: table(f64::cos), sin: table(f64::sin), mask: mask.repeat_dim(1, c.heads / c.kv_heads) }
    }

    /// Rotates the halves of every head: `[tokens, heads, head_dim]`.
    fn rotate(&self, x: Tensor<B, 3>, pass: &Pass<B>) -> Tensor<B, 3> {
        let half = self.config.head_dim / 2;
        let a = x.clone().narrow(2, 0, half);
        let b = x.narrow(2, half, half);
        let (cos, sin) = (pass.cos.clone(), pass.sin.clone());
        let first = a.clone().mul(cos.clone()).sub(b.clone().mul(sin.clone()));
        let second = b.mul(cos).add(a.mul(sin));
        Tensor::cat(vec![first, second], 2)
    }

    /// Self-attention of `[tokens, hidden]` over the cache and the tokens themselves.
    fn attention(
        &self,
        layer: &Layer<B>,
        x: Tensor<B, 2>,
        pass: &Pass<B>,
        cache: &mut Option<(Tensor<B, 3>, Tensor<B, 3>)>,
        keep: bool,
    ) -> Tensor<B, 2> {
        let c = &self.config;
        let [tokens, _] = x.dims();
        let group = c.heads / c.kv_heads;
        let heads = |x: Tensor<B, 2>, n: usize| x.reshape([tokens, n, c.head_dim]);
        let mut q = x.clone().matmul(layer.query.clone());
        let mut k = x.clone().matmul(layer.key.clone());
        let mut v = x.matmul(layer.value.clone());
        if let Some([query, key, value]) = &layer.bias {
            q = q.add(query.clone().unsqueeze());
            k = k.add(key.clone().unsqueeze());
            v = v.add(value.clone().unsqueeze());
        }
        let (mut q, mut k, v) = (heads(q, c.heads), heads(k, c.kv_heads), heads(v, c.kv_heads));
        if let Some([query, key]) = &layer.head_norms {
            q = self.rms_norm(q, query);
            k = self.rms_norm(k, key);
        }
        let (q, k) = (self.rotate(q, pass), self.rotate(k, pass));
        let (mut k, mut v) = (k.swap_dims(0, 1), v.swap_dims(0, 1));
        if let Some((past_k, past_v)) = cache.as_ref() {
            k = Tensor::cat(vec![past_k.clone(), k], 1);
            v = Tensor::cat(vec![past_v.clone(), v], 1);
        }
        if keep {
            *cache = Some((k.clone(), v.clone()));
        }
        // The query heads of a group share a key head: [kv_heads, group tokens, head_dim].
        let q = q.reshape([tokens, c.kv_heads, group * c.head_dim]).swap_dims(0, 1);
        let q = q.reshape([c.kv_heads, tokens, group, c.head_dim]).swap_dims(1, 2);
        let q = q.reshape([c.kv_heads, group * tokens, c.head_dim]);
        let scores = q.matmul(k.transpose()).mul_scalar(1.0 / (c.head_dim as f64).sqrt());
        let weights = softmax(scores.add(pass.mask.clone()), 2);
        let mixed = weights.matmul(v).reshape([c.kv_heads, group, tokens, c.head_dim]);
        let mixed = mixed.permute([2, 0, 1, 3]).reshape([tokens, c.q_width()]);
        mixed.matmul(layer.output.clone())
    }

    /// Final hidden states of a pack's tokens before the last norm, `[tokens, hidden]`.
    fn hidden(&self, cache: &mut Cache<B>, pack: &Pack, keep: bool) -> Tensor<B, 2> {
        let pass = self.pass(pack, cache.len);
        let mut x = self.embedding.clone().select(0, self.indices(pack.ids.iter().map(|id| *id as usize)));
        for (layer, cache) in self.layers.iter().zip(&mut cache.layers) {
            let normed = self.rms_norm(x.clone(), &layer.attention_norm);
            x = x.add(self.attention(layer, normed, &pass, cache, keep));
            let normed = self.rms_norm(x.clone(), &layer.mlp_norm);
            let gate = silu(normed.clone().matmul(layer.gate.clone()));
            let inner = gate.mul(normed.matmul(layer.up.clone()));
            x = x.add(inner.matmul(layer.down.clone()));
        }
        if keep {
            cache.len += pack.ids.len();
        }
        x
    }

    /// Numbers as an index tensor.
    fn indices(&self, values: impl Iterator<Item = usize>) -> Tensor<B, 1, Int> {
        let values: Vec<i64> = values.map(|v| v as i64).collect();
        let n = values.len();
        Tensor::from_data(TensorData::new(values, [n]), &self.device)
    }
}

impl<B: Backend> Decoder for BurnModel<B> {
    type Cache = Cache<B>;

    fn config(&self) -> &LlamaConfig {
        &self.config
    }

    fn batch_tokens(&self) -> usize {
        // The mask and the scores grow with the square of it.
        1024
    }

    fn empty(&self) -> Cache<B> {
        Cache { len: 0, layers: (0..self.config.layers).map(|_| None).collect() }
    }

    fn truncate(&self, cache: &mut Cache<B>, len: usize) {
        if len >= cache.len {
            return;
        }
        for layer in &mut cache.layers {
            *layer = layer.take().filter(|_| len > 0).map(|(k, v)| (k.narrow(1, 0, len), v.narrow(1, 0, len)));
        }
        cache.len = len;
    }

    fn forward(
        &self,
        cache: &mut Cache<B>,
        pack: &Pack,
        keep: bool,
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        let hidden = self.hidden(cache, pack, keep);
        if pack.read.is_empty() {
            return Ok(());
        }
        let rows = hidden.select(0, self.indices(pack.read.iter().copied()));
        let rows = self.rms_norm(rows, &self.final_norm);
        let n = pack.read.len();
        for from in (0..n).step_by(HEAD_ROWS) {
            let some = rows.clone().narrow(0, from, HEAD_ROWS.min(n - from));
            let logits = some.matmul(self.head.clone()).into_data();
            let logits = logits.as_slice::<f32>().map_err(|e| Error::internal(format!("logits are not f32: {e:?}")))?;
            for (r, row) in logits.chunks_exact(self.config.vocab_size).enumerate() {
                each(from + r, row);
            }
        }
        Ok(())
    }
}
