//! The hyper-parameters that a `search` stage found, as the artifact `best` with the file `hyper.json`, or that a `calibrate`
//! stage kept in `calibration.json`, with the number of epochs.
//!
//! In: what a search or a calibration chose. Out: the artifact, and in `train` the hyper-parameters in full.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::fusion::{Calibration, calibration};
use crate::recommenders::Backbone;
use crate::stages::context::Artifact;

/// The file.
pub(in crate::stages) const FILE: &str = "hyper.json";

/// `hyper.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::stages) struct Best {
    /// Name of the backbone.
    pub model: String,
    /// Its hyper-parameters in full.
    pub hyper: Value,
    /// The trial that they come from, 1-based.
    pub trial: usize,
    /// Name of the validation metric.
    pub metric: String,
    /// Its mean over the trial's seeds; null without validation.
    pub valid: Option<f64>,
}

impl Best {
    /// As an artifact.
    ///
    /// # Errors
    /// Only our bugs.
    pub fn artifact(&self) -> Result<Artifact> {
        let json = serde_json::to_vec_pretty(self).map_err(|e| Error::internal("hyper.json").because(e))?;
        Ok(Artifact { files: BTreeMap::from([(FILE.to_owned(), json.into())]) })
    }
}

/// The hyper-parameters of the artifact in full, with what is `given` in their place. Those of a calibration have the epochs
/// that were best on validation in the place of `epochs`.
///
/// # Errors
/// The file is damaged, or a calibration without a recommender (exit 65); it is of another model (exit 78).
pub(super) fn read(artifact: &Artifact, backbone: &Backbone, given: &Map<String, Value>) -> Result<Value> {
    let (model, mut hyper) = match artifact.files.get(calibration::FILE) {
        Some(file) => calibrated(file)?,
        None => {
            let best: Best = serde_json::from_slice(artifact.file(FILE)?)
                .map_err(|e| Error::data(format!("`{FILE}` of input `hyper_from` cannot be read")).because(e))?;
            (best.model, best.hyper)
        }
    };
    if model != backbone.name {
        return Err(Error::spec(format!(
            "`hyper_from` has the hyper-parameters of `{model}`, and `model` is `{}`",
            backbone.name
        ))
        .with_help("name the search or the calibration of the same model"));
    }
    if let Value::Object(found) = &mut hyper {
        found.extend(given.clone());
    }
    backbone.hyper(&hyper)
}

fn calibrated(file: &[u8]) -> Result<(String, Value)> {
    let found = Calibration::from_bytes(file)?.recommender.ok_or_else(|| {
        Error::data(format!("`{}` of input `hyper_from` says nothing of a recommender", calibration::FILE))
            .with_help("name the recommender in the `calibrate` stage, `model = \"STAGE.model\"`, and run it again")
    })?;
    let mut hyper = found.hyper;
    if let (Some(epochs), Some(field)) = (found.epochs, hyper.get_mut("epochs")) {
        *field = Value::from(epochs);
    }
    Ok((found.model, hyper))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recommenders::registry;
    use serde_json::json;

    #[test]
    fn what_is_given_goes_before_what_was_found() {
        let hyper = json!({"embedding_dim": 8, "layers": 2});
        let best = Best { model: "lightgcn".into(), hyper, trial: 3, metric: "NDCG@10".into(), valid: Some(0.5) };
        let artifact = best.artifact().unwrap();
        let backbone = registry::find("lightgcn").unwrap();
        let given = json!({"layers": 1}).as_object().cloned().unwrap();
        let hyper = read(&artifact, backbone, &given).unwrap();
        assert_eq!((&hyper["embedding_dim"], &hyper["layers"]), (&json!(8), &json!(1)));
        assert!(hyper["learning_rate"].is_number(), "defaults fill the rest");
        let error = read(&artifact, registry::find("mf").unwrap(), &given).unwrap_err();
        assert!(error.fault.exit_code() == 78 && error.message.contains("`lightgcn`"), "{error}");
        assert_eq!(read(&Artifact::default(), backbone, &given).unwrap_err().fault.exit_code(), 65);
    }

    #[test]
    fn a_calibration_brings_the_epochs_along() {
        let json = |recommender: Value| {
            let text = json!({
                "version": calibration::FORMAT, "mode": "label", "a1": 0.0, "a2": 0.0, "c": 1.0, "l_min": 0.0, "l_max": 1.0,
                "metric": "NDCG@10", "rule": "one-standard-error", "n_users": 3, "mean": 0.1, "recommender_mean": 0.1,
                "best": { "a1": 0.0, "a2": 0.0, "mean": 0.1 }, "recommender": recommender,
            });
            Artifact { files: BTreeMap::from([(calibration::FILE.to_owned(), text.to_string().into())]) }
        };
        let full = registry::find("lightgcn").unwrap().hyper(&json!({"layers": 2})).unwrap();
        let fitted = json!({ "model": "lightgcn", "hyper": full, "epochs": 37, "metrics": {}, "sha256": "" });
        let read_for = |name: &str, given: Value| {
            read(&json(fitted.clone()), registry::find(name).unwrap(), given.as_object().unwrap())
        };
        let hyper = read_for("lightgcn", json!({})).unwrap();
        assert_eq!((&hyper["layers"], &hyper["epochs"]), (&json!(2), &json!(37)));
        assert_eq!(read_for("lightgcn", json!({"epochs": 5})).unwrap()["epochs"], 5);
        assert_eq!(read_for("mf", json!({})).unwrap_err().fault.exit_code(), 78);
        let without = read(&json(Value::Null), registry::find("lightgcn").unwrap(), &Map::new()).unwrap_err();
        assert!(without.fault.exit_code() == 65 && without.message.contains("recommender"), "{without}");
    }
}
