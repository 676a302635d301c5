//! CL4SRec (Xie et al. 2022, arXiv 2010.14395): SASRec with a contrastive term over changed copies of each sequence.
//!
//! Two views of each training sequence are made, each by one of `augmentations` (crop, mask, reorder; section III-C);
//! their states at the last position should be nearer to each other than to those of the other sequences' views
//! (NT-Xent, eq. 2). The loss is SASRec's plus `cl_rate` times that (eq. 9).
//!
//! Reference implementation: SELFRec's `CL4SRec`, which has one kind of augmentation at a time (`aug_type`) and compares a
//! first view to second views only; ours compares every view to all others, as the paper does. States are compared by
//! cosine, as in SELFRec; the paper takes their product.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::idle::{self, Idle};
use super::registry::{Backbone, Make, Task};
use super::sequential::augmentation::Shares;
use super::sequential::{
    Activation, Augmentation, Decay, EncoderHyper, LossKind, NormPlace, Objective, OptimizerHyper, Positions,
    SequenceModel, SequentialScorer, Views, config, fit,
};
use super::trainer::Schedule;
use super::{Embeds, Fit, FitContext, Interactions, Recommender, hyper};
use crate::error::{Error, Result};

/// Hyper-parameters of `cl4srec`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Cl4SRecHyper {
    /// What a view may be, `crop`, `mask` and `reorder`; each view draws one of them. Default all three (the paper
    /// draws two of three; SELFRec's `aug_type` is one of them, 0 = crop).
    #[schemars(length(min = 1, max = 3))]
    pub augmentations: Vec<Augmentation>,
    /// Share of a sequence that `crop` keeps. Default 0.5 (SELFRec's `aug_rate`; the paper tries 0.1
    /// to 0.9).
    #[schemars(range(min = 0.0, max = 1.0))]
    pub crop_rate: f64,
    /// Share of the items that `mask` hides. Default 0.5 (SELFRec's `aug_rate`; the paper tries 0.1
    /// to 0.9).
    #[schemars(range(min = 0.0, max = 1.0))]
    pub mask_rate: f64,
    /// Share of a sequence that `reorder` shuffles. Default 0.5 (SELFRec's `aug_rate`; the paper tries 0.1
    /// to 0.9).
    #[schemars(range(min = 0.0, max = 1.0))]
    pub reorder_rate: f64,
    /// Weight of the contrastive term. Default 0.05 (SELFRec's `cl_rate`; the paper's lambda: 0.1).
    #[schemars(range(min = 0.0, max = 100.0))]
    pub cl_rate: f64,
    /// Temperature of the contrastive term. Default 1 (SELFRec).
    #[schemars(range(min = 0.001, max = 100.0))]
    pub temperature: f64,
    /// The transformer.
    #[serde(flatten)]
    pub encoder: EncoderHyper,
    /// Loss and steps.
    #[serde(flatten)]
    pub optimizer: OptimizerHyper,
}

impl Default for Cl4SRecHyper {
    fn default() -> Self {
        Cl4SRecHyper {
            augmentations: vec![Augmentation::Crop, Augmentation::Mask, Augmentation::Reorder],
            crop_rate: 0.5,
            mask_rate: 0.5,
            reorder_rate: 0.5,
            cl_rate: 0.05,
            temperature: 1.0,
            encoder: EncoderHyper {
                embedding_dim: 64,
                max_len: 100,
                blocks: 2,
                heads: 2,
                feed_forward_dim: 128,
                activation: Activation::Relu,
                norm: NormPlace::Post,
                positions: Positions::None,
                recency: 4.0,
                embedding_dropout: 0.3,
                attention_dropout: 0.2,
                hidden_dropout: 0.3,
                initial_deviation: 0.02,
            },
            optimizer: OptimizerHyper {
                loss: LossKind::Softmax,
                negatives: 512,
                negative_power: 0.75,
                exclude_seen: true,
                l2: 0.0,
                weight_decay: 0.0,
                clip_norm: 0.0,
                average: 0.99,
                warmup_epochs: 1.0,
                decay: Decay::Cosine,
                schedule: Schedule { learning_rate: 1e-3, batch_size: 8, epochs: 20, eval_every: 1, patience: 10 },
            },
        }
    }
}

impl Cl4SRecHyper {
    fn model(&self) -> SequenceModel {
        let shares = Shares { crop: self.crop_rate, mask: self.mask_rate, reorder: self.reorder_rate };
        SequenceModel {
            objective: Objective::Causal,
            encoder: self.encoder.clone(),
            optimizer: self.optimizer.clone(),
            views: Some(Views {
                weight: self.cl_rate,
                temperature: self.temperature,
                choices: self.augmentations.clone(),
                shares,
            }),
        }
    }

    /// What no single range can say.
    fn check(&self) -> Result<()> {
        config::check("cl4srec", &self.encoder)?;
        if self.augmentations.is_empty() {
            return Err(Error::spec("`augmentations` of `cl4srec` is empty").with_help(
                "name at least one of `crop`, `mask`, `reorder`; without a contrastive term this is `sasrec`",
            ));
        }
        Ok(())
    }
}

/// Why a rate is idle.
const NOT_NAMED: &str = "as `augmentations` does not name its kind";

/// Whether no view is made that way.
fn lacks(full: &serde_json::Value, kind: &str) -> bool {
    full["augmentations"].as_array().is_some_and(|kinds| kinds.iter().all(|k| k != kind))
}

/// `cl4srec` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "cl4srec",
    about: "CL4SRec: SASRec with a contrastive term over cropped, masked and reordered histories",
    task: Task::Sequential,
    schema: || schemars::schema_for!(Cl4SRecHyper),
    idle: &[
        config::IDLE[0],
        config::IDLE[1],
        Idle {
            keys: &["augmentations", "crop_rate", "mask_rate", "reorder_rate", "temperature"],
            when: |full| idle::is_zero(full, "cl_rate"),
            why: "with `cl_rate = 0`: there is no contrastive term",
        },
        Idle { keys: &["crop_rate"], when: |full| lacks(full, "crop"), why: NOT_NAMED },
        Idle { keys: &["mask_rate"], when: |full| lacks(full, "mask"), why: NOT_NAMED },
        Idle { keys: &["reorder_rate"], when: |full| lacks(full, "reorder"), why: NOT_NAMED },
    ],
    make: Make::Ranking {
        build: |given| {
            let hyper: Cl4SRecHyper = hyper::parse("cl4srec", given)?;
            hyper.check()?;
            Ok(Box::new(hyper))
        },
        load: |hyper, tensors| {
            let hyper: Cl4SRecHyper = config::saved("cl4srec", hyper)?;
            Ok(Box::new(SequentialScorer::load(&hyper.encoder, hyper.model().shape(0), tensors)?))
        },
    },
};

impl Recommender for Cl4SRecHyper {
    fn hyper(&self) -> serde_json::Value {
        hyper::to_json(self)
    }

    fn embeds(&self) -> Embeds {
        Embeds::Both
    }

    fn fit(&self, data: &Interactions<'_>, ctx: &FitContext<'_>) -> Result<Fit> {
        fit(&self.model(), data, ctx)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::sequential::contract;
    use super::*;

    #[test]
    fn loss_and_gradients_equal_pytorchs() {
        contract::golden("cl4srec");
    }

    #[test]
    fn a_ring_is_learned_with_each_loss() {
        contract::over_fits("cl4srec", &json!({"cl_rate": 0.01}));
    }

    #[test]
    fn the_same_seed_gives_the_same_model_on_any_number_of_threads() {
        for loss in ["softmax", "bce", "sampled-softmax"] {
            contract::repeats("cl4srec", &json!({"loss": loss}));
        }
    }

    #[test]
    fn a_fit_that_was_stopped_ends_as_one_that_was_not() {
        contract::resumes("cl4srec", &json!({"clip_norm": 1.0, "weight_decay": 0.1}));
    }

    #[test]
    fn a_saved_model_is_the_same_model() {
        contract::loads("cl4srec", &json!({"norm": "pre"}));
        contract::loads("cl4srec", &json!({"norm": "post", "positions": "none"}));
    }

    #[test]
    fn bad_input_is_borne() {
        contract::bears_bad_input("cl4srec", &json!({}));
        contract::bears_bad_input("cl4srec", &json!({"loss": "bce", "max_len": 1}));
    }

    #[test]
    fn settings_without_effect_are_refused() {
        let refused = |given| BACKBONE.hyper(&given).err().map(|e| (e.fault.exit_code(), e.message));
        let error = refused(json!({"loss": "softmax", "negatives": 7})).unwrap();
        assert!(error.0 == 78 && error.1.contains("`negatives`"), "{error:?}");
        assert_eq!(refused(json!({"loss": "sampled-softmax", "negatives": 7})), None);
        let error = refused(json!({"embedding_dim": 64, "heads": 3})).unwrap();
        assert!(error.0 == 78 && error.1.contains("`heads`"), "{error:?}");
        let error = refused(json!({"augmentations": ["crop"], "mask_rate": 0.2})).unwrap();
        assert!(error.0 == 78 && error.1.contains("`mask_rate`"), "{error:?}");
        assert!(refused(json!({"augmentations": []})).unwrap().1.contains("`augmentations`"));
    }
}
