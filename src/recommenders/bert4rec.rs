//! BERT4Rec (Sun et al. 2019, arXiv 1904.06690): a bidirectional transformer that fills in masked items.
//!
//! Training masks items at random and predicts them from both sides (Cloze); of some sequences only the last item is
//! masked, which is what a score asks for: the history is followed by the mask, and the state there, through a layer
//! with GELU and a normalisation, meets the item embeddings plus a bias per item (eq. 7).
//!
//! Reference implementations: SELFRec's `BERT4Rec` and RecBole's. As in the authors' code, and unlike
//! SELFRec's, positions are masked independently and states pass the head before they meet the items.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::idle::Idle;
use super::registry::{Backbone, Make, Task};
use super::sequential::{
    Activation, Decay, EncoderHyper, LossKind, NormPlace, Objective, OptimizerHyper, Positions, SequenceModel,
    SequentialScorer, config, fit,
};
use super::trainer::Schedule;
use super::{Embeds, Fit, FitContext, Interactions, Recommender, hyper};
use crate::error::Result;

/// Hyper-parameters of `bert4rec`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Bert4RecHyper {
    /// Probability that an item of a training sequence is masked; at least one always is. Default 0.3 (the paper for
    /// MovieLens: 0.2; SELFRec's `mask_rate`: 0.5).
    #[schemars(range(min = 0.0, max = 1.0))]
    pub mask_rate: f64,
    /// Share of the training sequences of which only the last item is masked, as it is in a score. The paper adds
    /// such samples without naming a number. Default 0.2.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub last_mask_rate: f64,
    /// How often an epoch has each sequence, masked anew each time. Default 2 (the authors' `dupe_factor`: 10).
    #[schemars(range(min = 1, max = 1000))]
    pub passes: u32,
    /// The transformer.
    #[serde(flatten)]
    pub encoder: EncoderHyper,
    /// Loss and steps.
    #[serde(flatten)]
    pub optimizer: OptimizerHyper,
}

impl Default for Bert4RecHyper {
    fn default() -> Self {
        Bert4RecHyper {
            mask_rate: 0.3,
            last_mask_rate: 0.2,
            passes: 2,
            encoder: EncoderHyper {
                embedding_dim: 64,
                max_len: 50,
                blocks: 2,
                heads: 2,
                feed_forward_dim: 128,
                activation: Activation::Gelu,
                norm: NormPlace::Post,
                positions: Positions::Learned,
                recency: 4.0,
                embedding_dropout: 0.2,
                attention_dropout: 0.2,
                hidden_dropout: 0.2,
                initial_deviation: 0.02,
            },
            optimizer: OptimizerHyper {
                loss: LossKind::Softmax,
                negatives: 512,
                negative_power: 0.75,
                exclude_seen: true,
                l2: 0.0,
                weight_decay: 0.0,
                clip_norm: 5.0,
                average: 0.99,
                warmup_epochs: 1.0,
                decay: Decay::Cosine,
                schedule: Schedule { learning_rate: 1e-3, batch_size: 16, epochs: 20, eval_every: 1, patience: 10 },
            },
        }
    }
}

impl Bert4RecHyper {
    fn model(&self) -> SequenceModel {
        SequenceModel {
            objective: Objective::Cloze {
                mask_share: self.mask_rate,
                last_only: self.last_mask_rate,
                passes: self.passes,
            },
            encoder: self.encoder.clone(),
            optimizer: self.optimizer.clone(),
            views: None,
        }
    }
}

/// `bert4rec` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "bert4rec",
    about: "BERT4Rec: a bidirectional transformer over the history that fills in masked items",
    task: Task::Sequential,
    schema: || schemars::schema_for!(Bert4RecHyper),
    idle: &[
        config::IDLE[0],
        config::IDLE[1],
        Idle {
            keys: &["mask_rate"],
            when: |full| full["last_mask_rate"].as_f64() == Some(1.0),
            why: "with `last_mask_rate = 1`: every sequence has its last item masked",
        },
    ],
    make: Make::Ranking {
        build: |given| {
            let hyper: Bert4RecHyper = hyper::parse("bert4rec", given)?;
            config::check("bert4rec", &hyper.encoder)?;
            Ok(Box::new(hyper))
        },
        load: |hyper, tensors| {
            let hyper: Bert4RecHyper = config::saved("bert4rec", hyper)?;
            Ok(Box::new(SequentialScorer::load(&hyper.encoder, hyper.model().shape(0), tensors)?))
        },
    },
};

impl Recommender for Bert4RecHyper {
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
        contract::golden("bert4rec");
    }

    #[test]
    fn a_ring_is_learned_with_each_loss() {
        // Histories have 7 items: a longer window would score at a position that none of them trains.
        contract::over_fits(
            "bert4rec",
            &json!({"epochs": 200, "mask_rate": 0.3, "last_mask_rate": 0.9, "max_len": 7, "patience": 100}),
        );
    }

    #[test]
    fn the_same_seed_gives_the_same_model_on_any_number_of_threads() {
        for loss in ["softmax", "bce", "sampled-softmax"] {
            contract::repeats("bert4rec", &json!({"loss": loss}));
        }
    }

    #[test]
    fn a_fit_that_was_stopped_ends_as_one_that_was_not() {
        contract::resumes("bert4rec", &json!({"clip_norm": 1.0, "weight_decay": 0.1}));
    }

    #[test]
    fn a_saved_model_is_the_same_model() {
        contract::loads("bert4rec", &json!({"norm": "pre"}));
        contract::loads("bert4rec", &json!({"norm": "post", "positions": "none"}));
    }

    #[test]
    fn bad_input_is_borne() {
        contract::bears_bad_input("bert4rec", &json!({}));
        contract::bears_bad_input("bert4rec", &json!({"loss": "bce", "max_len": 1}));
    }

    #[test]
    fn settings_without_effect_are_refused() {
        let refused = |given| BACKBONE.hyper(&given).err().map(|e| (e.fault.exit_code(), e.message));
        let error = refused(json!({"loss": "softmax", "negatives": 7})).unwrap();
        assert!(error.0 == 78 && error.1.contains("`negatives`"), "{error:?}");
        assert_eq!(refused(json!({"loss": "sampled-softmax", "negatives": 7})), None);
        let error = refused(json!({"embedding_dim": 64, "heads": 3})).unwrap();
        assert!(error.0 == 78 && error.1.contains("`heads`"), "{error:?}");
    }
}
