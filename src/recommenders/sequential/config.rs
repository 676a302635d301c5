//! Hyper-parameters that the sequential backbones share, and what goes together.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::idle::{self, Idle};
use super::super::trainer::Schedule;
use crate::error::{Error, Result};

/// What is minimised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LossKind {
    /// Binary cross-entropy with one item as negative that the user has not seen (SASRec, eq. 7).
    Bce,
    /// Cross-entropy of the softmax over the whole catalogue.
    Softmax,
    /// Cross-entropy of the softmax over the target and negatives that a batch shares, with each logit corrected
    /// by the logarithm of how often its item is drawn. For large catalogues.
    SampledSoftmax,
}

/// Where a block's layer normalisation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NormPlace {
    /// Before attention and feed-forward, inside the residual branch, and once more after the last block.
    Pre,
    /// After the residual sum, as in the first transformer.
    Post,
}

/// Activation of the feed-forward layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// `x * Phi(x)`, Phi the normal distribution.
    Gelu,
}

/// How a position enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Positions {
    /// One learned vector per place, counted from the oldest item of the window.
    Learned,
    /// Not at all; attention still cannot look ahead in a causal model.
    None,
}

/// How the step size falls after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Decay {
    /// Not at all.
    None,
    /// Along half a cosine to a twentieth of `learning_rate` at the end of `epochs`.
    Cosine,
}

/// A change of a sequence that should not change what it says about the user (CL4SRec, section III-C).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Augmentation {
    /// A contiguous part.
    Crop,
    /// Some items replaced by the mask.
    Mask,
    /// A contiguous part shuffled.
    Reorder,
}

/// The transformer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EncoderHyper {
    /// Length of item embeddings and states. Default 64 (SELFRec's `embedding.size`).
    #[schemars(range(min = 1, max = 4096))]
    pub embedding_dim: u32,
    /// Items of a history that a score reads, the latest ones; also the longest training window: longer histories are
    /// cut, anew in each epoch, and every interaction stays a target. Default 200 in `sasrec` (its paper's for MovieLens),
    /// 100 in `cl4srec`, 50 in `bert4rec` (SELFRec's `max.len`), by validation on ML-100K.
    #[schemars(range(min = 1, max = 4096))]
    pub max_len: u32,
    /// Number of transformer blocks. Default 2 (SELFRec's `n_blocks`).
    #[schemars(range(min = 1, max = 64))]
    pub blocks: u32,
    /// Attention heads; must divide `embedding_dim`. Default 2 (RecBole; SELFRec's `n_heads`: 1).
    #[schemars(range(min = 1, max = 64))]
    pub heads: u32,
    /// Width of the feed-forward layers. Default 128, twice `embedding_dim` (the SASRec paper's is `embedding_dim`,
    /// BERT4Rec's and RecBole's four times that).
    #[schemars(range(min = 1, max = 16384))]
    pub feed_forward_dim: u32,
    /// Activation of the feed-forward layers: `relu` (default of `sasrec` and `cl4srec`, as in the SASRec paper) or
    /// `gelu` (default of `bert4rec`, as in its paper).
    pub activation: Activation,
    /// Layer normalisation before (`pre`) or after (`post`) attention and feed-forward. Default `post` (BERT4Rec paper,
    /// RecBole; the SASRec paper and SELFRec normalise before).
    pub norm: NormPlace,
    /// `learned` vectors per place (all three papers; default of `bert4rec`), or `none` (default of `sasrec` and
    /// `cl4srec`, whose `recency` tells positions apart).
    pub positions: Positions,
    /// How fast attention falls with the distance in the history: a head's score loses `recency * 2^(-8 h / heads)` for
    /// each item between (h = 1, 2, ...; ALiBi, arXiv 2108.12409, has 1). Default 8 in `sasrec`, 4 in the others,
    /// by validation on ML-100K; 0 (all three papers) = not at all.
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub recency: f64,
    /// Dropout of the embedded sequence. Default 0.3, in `bert4rec` 0.2 (SELFRec's `drop_rate`, there for all three
    /// kinds: 0.2; RecBole: 0.5).
    #[schemars(range(min = 0.0, max = 0.95))]
    pub embedding_dropout: f64,
    /// Dropout of attention weights. Default 0.2 (SELFRec's `drop_rate`).
    #[schemars(range(min = 0.0, max = 0.95))]
    pub attention_dropout: f64,
    /// Dropout of what attention and feed-forward add to the residual. Default 0.3, in `bert4rec` 0.2 (SELFRec's
    /// `drop_rate`: 0.2; RecBole: 0.5).
    #[schemars(range(min = 0.0, max = 0.95))]
    pub hidden_dropout: f64,
    /// Standard deviation of the initial weights (normal, cut off at two deviations). Default 0.02 (BERT4Rec paper and
    /// RecBole).
    #[schemars(range(min = 0.000001, max = 1.0))]
    pub initial_deviation: f64,
}

/// Loss, regularisation and step size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OptimizerHyper {
    /// `bce` (one sampled negative; the papers of SASRec and CL4SRec), `softmax` over the catalogue (default; paper of
    /// BERT4Rec; far stronger for all three), or `sampled-softmax` for large catalogues.
    pub loss: LossKind,
    /// Negatives that a batch shares; used by `loss = "sampled-softmax"` only. Default 512.
    #[schemars(range(min = 1, max = 65536))]
    pub negatives: u32,
    /// Exponent of an item's frequency in train when negatives are drawn, 0 = uniformly; used by
    /// `loss = "sampled-softmax"` only. Default 0.75 (word2vec).
    #[schemars(range(min = 0.0, max = 2.0))]
    pub negative_power: f64,
    /// Whether items that the user has seen (in a causal model: before the position) are left out of the softmax, as they
    /// are left out of the ranking; used by `loss = "softmax"` only. Default true, by validation on ML-100K; the papers
    /// leave them in.
    pub exclude_seen: bool,
    /// Weight of the L2 term: half the mean square length of the targets' embeddings. Default 0 (SELFRec's
    /// `reg.lambda`: 0.0001, there on the norm of the whole table divided by its rows).
    #[schemars(range(min = 0.0, max = 10.0))]
    pub l2: f64,
    /// Decoupled weight decay of Adam (AdamW). Default 0 (SELFRec).
    #[schemars(range(min = 0.0, max = 10.0))]
    pub weight_decay: f64,
    /// The norm that a step's gradient is scaled down to; 0 = as it is. Default 0, in `bert4rec` 5 (its paper).
    #[schemars(range(min = 0.0, max = 1000000.0))]
    pub clip_norm: f64,
    /// How much the average of the weights keeps at each step; the average is what is validated and used. 0 = none: the
    /// weights themselves (SELFRec). Default 0.99.
    #[schemars(range(min = 0.0, max = 0.999999))]
    pub average: f64,
    /// Epochs in which the step size grows linearly to `learning_rate`; fractions allowed. Default 1 (SELFRec: none).
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub warmup_epochs: f64,
    /// How the step size falls afterwards: `none` (SELFRec) or `cosine` (default), whose length is `epochs`.
    pub decay: Decay,
    /// Epochs and steps. A batch is a number of sequences of at most `max_len` positions: where histories are short,
    /// `batch_size` should be larger than the defaults, which suit some 100 interactions per user.
    #[serde(flatten)]
    pub schedule: Schedule,
}

impl OptimizerHyper {
    /// Step size at `progress` epochs (fractions allowed).
    pub fn rate(&self, progress: f64) -> f64 {
        let (warmup, epochs) = (self.warmup_epochs, f64::from(self.schedule.epochs));
        let rate = self.schedule.learning_rate;
        if progress < warmup {
            return rate * (progress / warmup).max(1e-3);
        }
        match self.decay {
            Decay::None => rate,
            Decay::Cosine => {
                let share = ((progress - warmup) / (epochs - warmup).max(1e-9)).clamp(0.0, 1.0);
                rate * (0.05 + 0.95 * 0.5 * (1.0 + (std::f64::consts::PI * share).cos()))
            }
        }
    }
}

/// Checks what no single range can say.
///
/// # Errors
/// Heads that do not divide the dimension (exit 78).
pub fn check(model: &str, encoder: &EncoderHyper) -> Result<()> {
    if !encoder.embedding_dim.is_multiple_of(encoder.heads) {
        return Err(Error::spec(format!(
            "`heads` of `{model}` is {}, which does not divide `embedding_dim` = {}",
            encoder.heads, encoder.embedding_dim
        ))
        .with_help("choose a divisor, such as 1 or 2"));
    }
    Ok(())
}

/// Settings of one loss that the others do not read.
pub const IDLE: &[Idle] = &[
    Idle {
        keys: &["negatives", "negative_power"],
        when: |full| idle::is_not(full, "loss", "sampled-softmax"),
        why: "with this `loss`: only \"sampled-softmax\" draws shared negatives",
    },
    Idle {
        keys: &["exclude_seen"],
        when: |full| idle::is_not(full, "loss", "softmax"),
        why: "with this `loss`: only \"softmax\" goes over the whole catalogue",
    },
];

/// The hyper-parameters of a saved model.
///
/// # Errors
/// They cannot be read (exit 65).
pub fn saved<T: serde::de::DeserializeOwned>(model: &str, hyper: &Value) -> Result<T> {
    serde_json::from_value(hyper.clone())
        .map_err(|e| Error::data(format!("the saved hyper-parameters of `{model}` cannot be read")).because(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn optimizer(decay: Decay, warmup_epochs: f64) -> OptimizerHyper {
        OptimizerHyper {
            loss: LossKind::Softmax,
            negatives: 512,
            negative_power: 0.75,
            exclude_seen: false,
            l2: 0.0,
            weight_decay: 0.0,
            clip_norm: 0.0,
            average: 0.0,
            warmup_epochs,
            decay,
            schedule: Schedule { learning_rate: 0.01, batch_size: 2, epochs: 10, eval_every: 1, patience: 3 },
        }
    }

    #[test]
    fn the_step_size_grows_then_falls() {
        let h = optimizer(Decay::Cosine, 2.0);
        assert!(h.rate(0.0) > 0.0 && h.rate(0.0) < 1e-4);
        assert!((h.rate(1.0) - 0.005).abs() < 1e-12);
        assert!((h.rate(2.0) - 0.01).abs() < 1e-12);
        assert!((h.rate(6.0) - 0.00525).abs() < 1e-9);
        assert!((h.rate(10.0) - 0.0005).abs() < 1e-9);
        let h = optimizer(Decay::None, 0.0);
        assert_eq!((h.rate(0.0), h.rate(9.9)), (0.01, 0.01));
        // A warm-up longer than the fit never divides by nothing.
        assert!(optimizer(Decay::Cosine, 10.0).rate(10.0).is_finite());
    }
}
