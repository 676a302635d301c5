//! The transformer over item sequences that the three backbones share.
//!
//! In: embedded positions, flat `[batch * length, dim]`, and the sequences' lengths. Out: states of the same shape.
//! Linear layers see flat positions; only attention sees `[batch, length, dim]`.
//!
//! A block is attention and a feed-forward layer, each with a residual connection (SASRec, arXiv 1808.09781, section
//! III-B; BERT4Rec, arXiv 1904.06690, section 3.3). We differ from the SASRec authors' code in that queries, keys and
//! values all come of the normalised input, and from all three papers where `recency` lets attention fall with the
//! distance (ALiBi, arXiv 2108.12409): long histories then help, and a place needs no vector of its own.

use std::sync::Arc;

use burn::tensor::Tensor;
use burn::tensor::activation::relu;
use burn::tensor::backend::Backend;
use rand_chacha::ChaCha8Rng;

use super::super::ops::{self, AttentionMask, attention_by_distance};
use super::super::optim::{ParamId, Params, Vars, truncated_normal};
use super::config::{Activation, EncoderHyper, NormPlace, Positions};
use crate::device::ModelBackend;

/// What differs between the backbones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Size of the catalogue.
    pub n_items: usize,
    /// Whether a position sees only itself and those before it.
    pub causal: bool,
    /// Whether the item table has a row for the mask, after the items.
    pub mask_row: bool,
    /// Whether states pass a layer with GELU and normalisation before they meet the item table, and items have a bias
    /// (BERT4Rec, eq. 7).
    pub head: bool,
}

/// Names of the weights.
#[derive(Clone, Debug)]
pub struct Encoder {
    hyper: EncoderHyper,
    shape: Shape,
    /// `[items (+ 1), dim]`.
    pub items: ParamId,
    /// `[items]`.
    pub bias: Option<ParamId>,
    /// `[max_len, dim]`.
    positions: Option<ParamId>,
    /// Per head, what each position of distance takes off an attention score; empty = nothing.
    slopes: Arc<[f32]>,
    embedded: Norm,
    blocks: Vec<Block>,
    /// With `norm = "pre"`.
    last: Option<Norm>,
    head: Option<(Linear, Norm)>,
}

#[derive(Clone, Copy, Debug)]
struct Norm {
    scale: ParamId,
    shift: ParamId,
}

#[derive(Clone, Copy, Debug)]
struct Linear {
    /// `[in, out]`.
    weight: ParamId,
    /// `[out]`.
    bias: ParamId,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    attention_norm: Norm,
    /// Queries, keys, values.
    qkv: [Linear; 3],
    out: Linear,
    forward_norm: Norm,
    up: Linear,
    down: Linear,
}

/// Dropout of one pass: each place where it happens has its own stream of one seed.
#[derive(Clone, Debug)]
pub struct Dropout {
    seed: u64,
    places: u64,
}

impl Dropout {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Dropout { seed, places: 0 }
    }

    fn next(&mut self) -> u64 {
        self.places += 1;
        mix(self.seed.wrapping_add(self.places.wrapping_mul(0xA076_1D64_78BD_642F)))
    }
}

fn drop<B: ModelBackend>(dropout: &mut Option<&mut Dropout>, x: Tensor<B, 2>, share: f64) -> Tensor<B, 2> {
    match dropout {
        Some(places) => ops::dropout(x, share as f32, places.next()),
        None => x,
    }
}

/// SplitMix64's last step.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

impl Norm {
    fn new<B: Backend>(params: &mut Params<B>, name: &str, dim: usize) -> Self {
        Norm {
            scale: params.add(&format!("{name}.scale"), &[dim], vec![1.0; dim]),
            shift: params.add(&format!("{name}.shift"), &[dim], vec![0.0; dim]),
        }
    }

    fn forward<B: ModelBackend>(&self, vars: &Vars<B>, x: Tensor<B, 2>) -> Tensor<B, 2> {
        ops::layer_norm(x, vars.get::<1>(self.scale), vars.get::<1>(self.shift))
    }
}

impl Linear {
    fn new<B: Backend>(params: &mut Params<B>, name: &str, (rows, cols): (usize, usize), init: &mut Init<'_>) -> Self {
        Linear {
            weight: params.add(&format!("{name}.weight"), &[rows, cols], init.values(rows * cols)),
            bias: params.add(&format!("{name}.bias"), &[cols], vec![0.0; cols]),
        }
    }

    fn forward<B: ModelBackend>(&self, vars: &Vars<B>, x: Tensor<B, 2>) -> Tensor<B, 2> {
        ops::linear(x, vars.get::<2>(self.weight), Some(vars.get::<1>(self.bias)))
    }
}

/// ALiBi's slopes, `2^(-8 (h + 1) / heads)`, times `recency`.
fn slopes(hyper: &EncoderHyper) -> Arc<[f32]> {
    if hyper.recency == 0.0 {
        return Arc::new([]);
    }
    let slope = |head: u32| hyper.recency * (-8.0 * f64::from(head + 1) / f64::from(hyper.heads)).exp2();
    (0..hyper.heads).map(|head| slope(head) as f32).collect()
}

struct Init<'a> {
    deviation: f32,
    rng: Option<&'a mut ChaCha8Rng>,
}

impl Init<'_> {
    fn values(&mut self, n: usize) -> Vec<f32> {
        match &mut self.rng {
            Some(rng) => truncated_normal(n, self.deviation, *rng),
            None => vec![0.0; n],
        }
    }
}

impl Encoder {
    /// Adds the weights to `params`: random ones, or zeros without `rng` (to be replaced by saved ones).
    pub fn new<B: Backend>(
        hyper: &EncoderHyper,
        shape: Shape,
        params: &mut Params<B>,
        rng: Option<&mut ChaCha8Rng>,
    ) -> Self {
        let (dim, inner) = (hyper.embedding_dim as usize, hyper.feed_forward_dim as usize);
        let init = &mut Init { deviation: hyper.initial_deviation as f32, rng };
        let rows = shape.n_items + usize::from(shape.mask_row);
        let items = params.add("item_embeddings", &[rows, dim], init.values(rows * dim));
        let positions = (hyper.positions == Positions::Learned).then(|| {
            let n = hyper.max_len as usize;
            params.add("position_embeddings", &[n, dim], init.values(n * dim))
        });
        let embedded = Norm::new(params, "embedded_norm", dim);
        let blocks = (0..hyper.blocks)
            .map(|n| Block {
                attention_norm: Norm::new(params, &format!("blocks.{n}.attention_norm"), dim),
                qkv: ["query", "key", "value"]
                    .map(|part| Linear::new(params, &format!("blocks.{n}.{part}"), (dim, dim), init)),
                out: Linear::new(params, &format!("blocks.{n}.out"), (dim, dim), init),
                forward_norm: Norm::new(params, &format!("blocks.{n}.forward_norm"), dim),
                up: Linear::new(params, &format!("blocks.{n}.up"), (dim, inner), init),
                down: Linear::new(params, &format!("blocks.{n}.down"), (inner, dim), init),
            })
            .collect();
        let last = (hyper.norm == NormPlace::Pre).then(|| Norm::new(params, "last_norm", dim));
        let head =
            shape.head.then(|| (Linear::new(params, "head", (dim, dim), init), Norm::new(params, "head_norm", dim)));
        let bias = shape.head.then(|| params.add("item_bias", &[shape.n_items], vec![0.0; shape.n_items]));
        let slopes = slopes(hyper);
        Encoder { hyper: hyper.clone(), shape, items, bias, positions, slopes, embedded, blocks, last, head }
    }

    /// The hyper-parameters.
    pub fn hyper(&self) -> &EncoderHyper {
        &self.hyper
    }

    /// What differs between the backbones.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// States of all positions. `items [batch * length, dim]` are item embeddings; with `dropout` values are dropped.
    ///
    /// # Panics
    /// When a shape does not fit (our bug).
    pub fn encode<B: ModelBackend>(
        &self,
        vars: &Vars<B>,
        items: Tensor<B, 2>,
        lengths: &[u32],
        mut dropout: Option<&mut Dropout>,
    ) -> Tensor<B, 2> {
        let [flat, dim] = items.dims();
        let batch = lengths.len();
        let length = flat / batch.max(1);
        let hyper = &self.hyper;
        let mut x = items;
        if let Some(positions) = self.positions {
            let table = vars.get::<2>(positions).narrow(0, 0, length).reshape([1, length, dim]);
            x = (x.reshape([batch, length, dim]) + table).reshape([flat, dim]);
        }
        x = drop(&mut dropout, self.embedded.forward(vars, x), hyper.embedding_dropout);
        for block in &self.blocks {
            let attention = |x: Tensor<B, 2>, dropout: Option<(f32, u64)>| {
                let part = |l: &Linear| l.forward(vars, x.clone()).reshape([batch, length, dim]);
                let [q, k, v] = block.qkv.each_ref().map(part);
                let mask = AttentionMask { lengths, causal: self.shape.causal };
                let y = attention_by_distance(q, k, v, hyper.heads as usize, mask, dropout, &self.slopes);
                block.out.forward(vars, y.reshape([flat, dim]))
            };
            let feed = |x: Tensor<B, 2>| {
                let up = block.up.forward(vars, x);
                let up = match hyper.activation {
                    Activation::Relu => relu(up),
                    Activation::Gelu => ops::gelu(up),
                };
                block.down.forward(vars, up)
            };
            let share = hyper.attention_dropout as f32;
            let seed = dropout.as_mut().map(|d| (share, d.next())).filter(|_| share > 0.0);
            x = match hyper.norm {
                NormPlace::Pre => {
                    let y = attention(block.attention_norm.forward(vars, x.clone()), seed);
                    let x = x + drop(&mut dropout, y, hyper.hidden_dropout);
                    let y = feed(block.forward_norm.forward(vars, x.clone()));
                    x + drop(&mut dropout, y, hyper.hidden_dropout)
                }
                NormPlace::Post => {
                    let y = attention(x.clone(), seed);
                    let x = block.attention_norm.forward(vars, x + drop(&mut dropout, y, hyper.hidden_dropout));
                    let y = feed(x.clone());
                    block.forward_norm.forward(vars, x + drop(&mut dropout, y, hyper.hidden_dropout))
                }
            };
        }
        match &self.last {
            Some(norm) => norm.forward(vars, x),
            None => x,
        }
    }

    /// What meets the item table: the states, or the head's output where there is one. `[n, dim]` both.
    pub fn project<B: ModelBackend>(&self, vars: &Vars<B>, states: Tensor<B, 2>) -> Tensor<B, 2> {
        match &self.head {
            Some((linear, norm)) => norm.forward(vars, ops::gelu(linear.forward(vars, states))),
            None => states,
        }
    }
}
