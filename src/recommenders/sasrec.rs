//! SASRec (Kang and McAuley 2018, arXiv 1808.09781): a causal transformer that predicts the next item at every position.
//!
//! Item embeddings are shared between input and output. With `loss = "bce"` the loss is the paper's (eq. 7: one sampled
//! negative); `loss = "softmax"` is the cross-entropy over the catalogue, which is far stronger.
//!
//! Reference implementations: SELFRec's `SASRec` and RecBole's. As in RecBole the embedded sequence is normalised before
//! the first block and a dropout follows. The defaults are not the paper's: softmax over unseen items, and attention
//! that falls with the distance instead of position embeddings, were each a gain on ML-100K's validation.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::registry::{Backbone, Make, Task};
use super::sequential::{
    Activation, Decay, EncoderHyper, LossKind, NormPlace, Objective, OptimizerHyper, Positions, SequenceModel,
    SequentialScorer, config, fit,
};
use super::trainer::Schedule;
use super::{Embeds, Fit, FitContext, Interactions, Recommender, hyper};
use crate::error::Result;

/// Hyper-parameters of `sasrec`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SasRecHyper {
    /// The transformer.
    #[serde(flatten)]
    pub encoder: EncoderHyper,
    /// Loss and steps.
    #[serde(flatten)]
    pub optimizer: OptimizerHyper,
}

impl Default for SasRecHyper {
    fn default() -> Self {
        SasRecHyper {
            encoder: EncoderHyper {
                embedding_dim: 64,
                max_len: 200,
                blocks: 2,
                heads: 2,
                feed_forward_dim: 128,
                activation: Activation::Relu,
                norm: NormPlace::Post,
                positions: Positions::None,
                recency: 8.0,
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
                schedule: Schedule { learning_rate: 1e-3, batch_size: 4, epochs: 20, eval_every: 1, patience: 10 },
            },
        }
    }
}

impl SasRecHyper {
    fn model(&self) -> SequenceModel {
        SequenceModel {
            objective: Objective::Causal,
            encoder: self.encoder.clone(),
            optimizer: self.optimizer.clone(),
            views: None,
        }
    }
}

/// `sasrec` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "sasrec",
    about: "SASRec: a causal transformer over the history that predicts the next item at every position",
    task: Task::Sequential,
    schema: || schemars::schema_for!(SasRecHyper),
    idle: config::IDLE,
    make: Make::Ranking {
        build: |given| {
            let hyper: SasRecHyper = hyper::parse("sasrec", given)?;
            config::check("sasrec", &hyper.encoder)?;
            Ok(Box::new(hyper))
        },
        load: |hyper, tensors| {
            let hyper: SasRecHyper = config::saved("sasrec", hyper)?;
            Ok(Box::new(SequentialScorer::load(&hyper.encoder, hyper.model().shape(0), tensors)?))
        },
    },
};

impl Recommender for SasRecHyper {
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
        contract::golden("sasrec");
    }

    #[test]
    fn a_ring_is_learned_with_each_loss() {
        contract::over_fits("sasrec", &json!({}));
    }

    #[test]
    fn the_same_seed_gives_the_same_model_on_any_number_of_threads() {
        for loss in ["softmax", "bce", "sampled-softmax"] {
            contract::repeats("sasrec", &json!({"loss": loss}));
        }
    }

    #[test]
    fn a_fit_that_was_stopped_ends_as_one_that_was_not() {
        contract::resumes("sasrec", &json!({"clip_norm": 1.0, "weight_decay": 0.1}));
    }

    #[test]
    fn a_saved_model_is_the_same_model() {
        contract::loads("sasrec", &json!({"norm": "pre"}));
        contract::loads("sasrec", &json!({"norm": "post", "positions": "none"}));
    }

    #[test]
    fn bad_input_is_borne() {
        contract::bears_bad_input("sasrec", &json!({}));
        contract::bears_bad_input("sasrec", &json!({"loss": "bce", "max_len": 1}));
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
