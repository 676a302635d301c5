//! The Llama-like decoder on any Burn back end.
//!
//! Architecture: LLaMA (arXiv 2302.13971) with grouped-query attention (arXiv 2305.13245): per
//! layer RMSNorm, attention with rotary positions (arXiv 2104.09864, halves rotated as in Hugging
//! Face's `modeling_llama.py`), RMSNorm, SwiGLU; residual connections around both; biases (Qwen2)
//! and norms of heads (Qwen3) where the configuration has them. Reference implementation: transformers,
//! `models/{llama,qwen2,qwen3}/modeling_*.py`.
//!
//! Where we deviate: a batch is one row of tokens ([`Pack`]), not a padded rectangle; attention goes by blocks
//! ([`Blocks`]); the head runs on the rows that are read only. With `half`, weights, keys, values and the operands of
//! products are bfloat16; norms, softmax, rotation and the residual stream stay f32.

use burn::tensor::activation::silu;
use burn::tensor::backend::Backend;
use burn::tensor::{FloatDType, Tensor, TensorData};

use super::blocks::{self, Blocks, indices};
use super::config::LlamaConfig;
use super::decoder::{Decoder, PassSize, Wanted};
use super::pack::{Pack, Read};
use super::weights::{EMBEDDING, FINAL_NORM, HEAD, Weights, layer_bias, layer_tensor};
use crate::error::{Error, Result};

/// Rows of logits that are made at once.
const HEAD_ROWS: usize = 64;

/// Tokens of a batch on a CPU, and on a GPU, which only many fill.
const BATCH_TOKENS: [usize; 2] = [1024, 8192];

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
    /// Whether weights and the operands of products are bfloat16.
    half: bool,
    batch_tokens: usize,
    /// `[vocab, hidden]`.
    embedding: Tensor<B, 2>,
    layers: Vec<Layer<B>>,
    /// `[hidden]`.
    final_norm: Tensor<B, 1>,
    /// `[vocab, hidden]`; the embedding where it is tied.
    head: Tensor<B, 2>,
}

/// Keys and values of a layer.
type Kv<B> = (Tensor<B, 2>, Tensor<B, 2>);

/// Keys and values of consecutive tokens, per layer `[len, kv_width]` each.
pub struct Segment<B: Backend> {
    len: usize,
    layers: Vec<Kv<B>>,
}

/// What all layers of one pass share.
struct Pass<B: Backend> {
    /// `[tokens, 1, head_dim / 2]`.
    cos: Tensor<B, 3>,
    /// `[tokens, 1, head_dim / 2]`.
    sin: Tensor<B, 3>,
    blocks: Blocks<B>,
}

/// Where a model runs on Burn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// bfloat16 weights and products.
    pub half: bool,
    /// Whether many tokens at once are wanted to fill it.
    pub gpu: bool,
}

impl<B: Backend> BurnModel<B> {
    /// Loads weights onto a device.
    ///
    /// # Errors
    /// Exit 65 where a tensor cannot be read.
    pub fn load(weights: &Weights, device: &B::Device, placement: Placement) -> Result<Self> {
        let Placement { half, gpu } = placement;
        let c = weights.config().clone();
        let vector = |name: &str| -> Result<Tensor<B, 1>> {
            let values = weights.values(name)?;
            let n = values.len();
            Ok(Tensor::from_data(TensorData::new(values, [n]), device))
        };
        let rows = |name: &str, out: usize, width: usize| -> Result<Tensor<B, 2>> {
            let matrix = Tensor::<B, 2>::from_data(TensorData::new(weights.values(name)?, [out, width]), device);
            Ok(if half { matrix.cast(FloatDType::BF16) } else { matrix })
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
        let batch_tokens = BATCH_TOKENS[usize::from(gpu)];
        let device = device.clone();
        Ok(BurnModel { device, half, batch_tokens, embedding, layers, final_norm, head, config: c })
    }

    /// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension: rows `[tokens, hidden]`, heads `[tokens, heads, head_dim]`.
    fn rms_norm<const D: usize>(&self, x: Tensor<B, D>, weight: &Tensor<B, 1>) -> Tensor<B, D> {
        let mean_square = x.clone().powi_scalar(2).mean_dim(D - 1);
        let scale = mean_square.add_scalar(self.config.rms_eps).sqrt().recip();
        x.mul(scale).mul(weight.clone().unsqueeze())
    }

    /// Positions and blocks of a pack.
    fn pass(&self, pack: &Pack, past: &[&Segment<B>]) -> Pass<B> {
        let c = &self.config;
        let half = c.head_dim / 2;
        let frequencies = c.rope_frequencies();
        let mut angles = vec![0f32; pack.ids.len() * half];
        for run in &pack.runs {
            for t in 0..run.len {
                let position = (run.position + t) as f32;
                for (angle, f) in angles[(run.start + t) * half..].iter_mut().zip(&frequencies) {
                    *angle = position * f;
                }
            }
        }
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|a| f(f64::from(*a)) as f32).collect();
            Tensor::from_data(TensorData::new(values, [pack.ids.len(), 1, half]), &self.device)
        };
        let lens: Vec<usize> = past.iter().map(|s| s.len).collect();
        Pass { cos: table(f64::cos), sin: table(f64::sin), blocks: Blocks::new(c, pack, &lens, &self.device) }
    }

    /// The operand of a product.
    fn operand(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        if self.half { x.cast(FloatDType::BF16) } else { x }
    }

    /// What a product gives, in f32.
    fn wide<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        if self.half { x.cast(FloatDType::F32) } else { x }
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

    /// Heads of a projection `[tokens, heads * head_dim]` with its bias, normed where the model does so, rotated, as an operand.
    fn heads(&self, x: Tensor<B, 2>, part: usize, layer: &Layer<B>, pass: &Pass<B>) -> Tensor<B, 2> {
        let [tokens, width] = x.dims();
        let dim = self.config.head_dim;
        let mut x = self.biased(x, part, layer).reshape([tokens, width / dim, dim]);
        if let Some(norms) = &layer.head_norms {
            x = self.rms_norm(x, &norms[part]);
        }
        self.operand(self.rotate(x, pass).reshape([tokens, width]))
    }

    /// A projection (0 query, 1 key, 2 value) with its bias, in f32.
    fn biased(&self, x: Tensor<B, 2>, part: usize, layer: &Layer<B>) -> Tensor<B, 2> {
        let x = self.wide(x);
        match &layer.bias {
            Some(bias) => x.add(bias[part].clone().unsqueeze()),
            None => x,
        }
    }

    /// Final hidden states of a pack's tokens before the last norm, `[tokens, hidden]`; `keep` gets every layer's keys and values.
    fn hidden(
        &self,
        pack: &Pack,
        past: &[&Segment<B>],
        keep: &mut dyn FnMut(&Tensor<B, 2>, &Tensor<B, 2>),
    ) -> Tensor<B, 2> {
        let c = &self.config;
        let pass = self.pass(pack, past);
        let ids: Vec<usize> = pack.ids.iter().map(|id| *id as usize).collect();
        let mut x = self.wide(self.embedding.clone().select(0, indices(&ids, &self.device)));
        for (i, layer) in self.layers.iter().enumerate() {
            let normed = self.operand(self.rms_norm(x.clone(), &layer.attention_norm));
            let q = self.heads(normed.clone().matmul(layer.query.clone()), 0, layer, &pass);
            let k = self.heads(normed.clone().matmul(layer.key.clone()), 1, layer, &pass);
            let v = self.operand(self.biased(normed.matmul(layer.value.clone()), 2, layer));
            keep(&k, &v);
            let with_past = |fresh: Tensor<B, 2>, which: fn(&Kv<B>) -> &Tensor<B, 2>| {
                if past.is_empty() {
                    return fresh;
                }
                let cached = past.iter().map(|s| which(&s.layers[i]).clone());
                Tensor::cat(cached.chain([fresh]).collect(), 0)
            };
            let (k, v) = (with_past(k, |kv| &kv.0), with_past(v, |kv| &kv.1));
            let mixed = pass.blocks.attend(c, &q, &k, &v);
            x = x.add(self.wide(mixed.matmul(layer.output.clone())));
            let normed = self.operand(self.rms_norm(x.clone(), &layer.mlp_norm));
            let gate = silu(self.wide(normed.clone().matmul(layer.gate.clone())));
            let inner = self.operand(gate.mul(self.wide(normed.matmul(layer.up.clone()))));
            x = x.add(self.wide(inner.matmul(layer.down.clone())));
        }
        x
    }

    /// What is wanted of some read rows of one kind, given their hidden states after the last norm: the numbers of each row,
    /// of the same width (more than a row's own where another wants more ids).
    fn answer(&self, rows: Tensor<B, 2>, wanted: &[&Wanted]) -> Result<(Vec<f32>, usize)> {
        let n = wanted.len();
        let product = |rows: Tensor<B, 2>, head: Tensor<B, 2>| {
            let rows = self.operand(rows);
            self.wide(rows.matmul(head.transpose()))
        };
        let values = match wanted[0] {
            Wanted::Hidden => rows,
            Wanted::Vocabulary => product(rows, self.head.clone()),
            Wanted::Logits(_) => {
                let most = wanted.iter().map(|w| w.ids().len()).max().unwrap_or(0).max(1);
                let mut union: Vec<u32> = wanted.iter().flat_map(|w| w.ids().iter().copied()).collect();
                union.sort_unstable();
                union.dedup();
                let place = |id: &u32| union.binary_search(id).unwrap_or_default();
                let picks = padded(wanted, most, &place);
                let union: Vec<usize> = union.iter().map(|id| *id as usize).collect();
                let logits = product(rows, self.head.clone().select(0, indices(&union, &self.device)));
                logits.gather(1, indices(&picks, &self.device).reshape([n, most]))
            }
            Wanted::LogProbs(_) => {
                let most = wanted.iter().map(|w| w.ids().len()).max().unwrap_or(0).max(1);
                let picks = padded(wanted, most, &|id| *id as usize);
                let logits = product(rows, self.head.clone());
                let max = logits.clone().max_dim(1);
                let normalizer = logits.clone().sub(max.clone()).exp().sum_dim(1).log().add(max);
                logits.gather(1, indices(&picks, &self.device).reshape([n, most])).sub(normalizer)
            }
        };
        let width = values.dims()[1];
        let values = values.into_data().into_vec::<f32>();
        Ok((values.map_err(|e| Error::internal(format!("results are not f32: {e:?}")))?, width))
    }
}

/// The places of each row's ids, filled up to `most` with 0.
fn padded(wanted: &[&Wanted], most: usize, place: &dyn Fn(&u32) -> usize) -> Vec<usize> {
    let row = |w: &&Wanted| {
        let mut row: Vec<usize> = w.ids().iter().map(place).collect();
        row.resize(most, 0);
        row
    };
    wanted.iter().flat_map(row).collect()
}

impl<B: Backend> Decoder for BurnModel<B> {
    type Segment = Segment<B>;

    fn config(&self) -> &LlamaConfig {
        &self.config
    }

    fn batch_tokens(&self) -> usize {
        self.batch_tokens
    }

    fn weight_bytes(&self) -> usize {
        self.config.parameters() * if self.half { 2 } else { 4 }
    }

    fn token_bytes(&self) -> usize {
        2 * self.config.layers * self.config.kv_width() * if self.half { 2 } else { 4 }
    }

    fn pass_bytes(&self, PassSize { tokens, seen, past }: PassSize) -> usize {
        let c = &self.config;
        let layer = 8 * c.hidden + 4 * (c.q_width() + 2 * c.kv_width()) + 5 * c.intermediate;
        // A layer's keys and values are brought together with those of the past.
        let rows = tokens * layer + 2 * past * c.kv_width() + 4 * HEAD_ROWS * c.vocab_size;
        4 * rows + blocks::bytes(c, tokens, seen) + 1024 * tokens
    }

    fn slice(&self, segment: &Segment<B>, from: usize, len: usize) -> Segment<B> {
        // Selected, not sliced: a slice may be a view that keeps all of it in memory.
        let rows = indices(&(from..from + len).collect::<Vec<_>>(), &self.device);
        let some = |x: &Tensor<B, 2>| x.clone().select(0, rows.clone());
        Segment { len, layers: segment.layers.iter().map(|(k, v)| (some(k), some(v))).collect() }
    }

    fn forward(
        &self,
        pack: &Pack,
        past: &[&Segment<B>],
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<Vec<Segment<B>>> {
        let runs: Vec<_> = pack.runs.iter().filter(|run| run.keep > 0).collect();
        let mut kept: Vec<Segment<B>> =
            runs.iter().map(|run| Segment { len: run.keep, layers: Vec::with_capacity(self.layers.len()) }).collect();
        let rows: Vec<_> = runs
            .iter()
            .map(|run| indices(&(run.start..run.start + run.keep).collect::<Vec<_>>(), &self.device))
            .collect();
        let hidden = self.hidden(pack, past, &mut |k, v| {
            for (segment, rows) in kept.iter_mut().zip(&rows) {
                segment.layers.push((k.clone().select(0, rows.clone()), v.clone().select(0, rows.clone())));
            }
        });
        if pack.read.is_empty() {
            return Ok(kept);
        }
        let at: Vec<usize> = pack.read.iter().map(|r| r.at).collect();
        let rows = self.rms_norm(hidden.select(0, indices(&at, &self.device)), &self.final_norm);
        let mut by_kind: [Vec<usize>; 4] = Default::default();
        for (r, Read { wanted, .. }) in pack.read.iter().enumerate() {
            by_kind[usize::from(wanted.kind())].push(r);
        }
        for part in by_kind.iter().flat_map(|reads| reads.chunks(HEAD_ROWS)) {
            let wanted: Vec<&Wanted> = part.iter().map(|r| &pack.read[*r].wanted).collect();
            let (values, width) = self.answer(rows.clone().select(0, indices(part, &self.device)), &wanted)?;
            for ((r, wanted), row) in part.iter().zip(wanted).zip(values.chunks_exact(width)) {
                match wanted {
                    Wanted::Logits(ids) | Wanted::LogProbs(ids) => each(*r, &row[..ids.len()]),
                    Wanted::Vocabulary | Wanted::Hidden => each(*r, row),
                }
            }
        }
        Ok(kept)
    }
}
