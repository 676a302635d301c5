//! The hyper-parameters that a `search` stage found, as the artifact `best` with the file `hyper.json`.
//!
//! In: what a search chose. Out: the artifact, and in `train` the hyper-parameters in full.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
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

/// The hyper-parameters of the artifact in full, with what is `given` in their place.
///
/// # Errors
/// The file is damaged (exit 65), or of another model (exit 78).
pub(super) fn read(artifact: &Artifact, backbone: &Backbone, given: &Map<String, Value>) -> Result<Value> {
    let best: Best = serde_json::from_slice(artifact.file(FILE)?)
        .map_err(|e| Error::data(format!("`{FILE}` of input `hyper_from` cannot be read")).because(e))?;
    if best.model != backbone.name {
        return Err(Error::spec(format!(
            "`hyper_from` has the hyper-parameters of `{}`, and `model` is `{}`",
            best.model, backbone.name
        ))
        .with_help("name the search of the same model"));
    }
    let mut hyper = best.hyper;
    if let Value::Object(found) = &mut hyper {
        found.extend(given.clone());
    }
    backbone.hyper(&hyper)
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
}
