//! All backbones, ordered and greppable. Adding one: a file, a `pub mod` line, an entry here.

use schemars::Schema;
use serde_json::Value;

use super::idle::{self, Idle};
use super::rating::{Predictor, RatingRecommender};
use super::saved::Tensors;
use super::{Recommender, Scorer, hyper};
use crate::error::{Error, Result};
use crate::interactions::fields::FieldSet;

/// What a backbone predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// A ranked set of items; the order of the history does not matter.
    Direct,
    /// The next item after a history in time order.
    Sequential,
    /// The rating of a (user, item) pair.
    Rating,
}

/// One backbone.
pub struct Backbone {
    /// `model = "..."` in the pipeline file; also the file's name in `src/recommenders/`.
    pub name: &'static str,
    /// One line for the docs.
    pub about: &'static str,
    /// What it predicts.
    pub task: Task,
    /// JSON Schema of its hyper-parameters, from the type that `build` reads.
    pub schema: fn() -> Schema,
    /// Hyper-parameters that have no effect in some case.
    pub idle: &'static [Idle],
    /// How to make it.
    pub make: Make,
}

/// Hyper-parameters (already checked against the schema) -> a model to fit; its hyper-parameters in full and saved
/// weights -> a fitted model. `load`'s errors (exit 65) name the tensor that is missing or has a wrong shape.
pub enum Make {
    /// Ranks items: tasks direct and sequential.
    Ranking {
        /// To fit.
        build: fn(hyper: Value) -> Result<Box<dyn Recommender>>,
        /// From a file.
        load: fn(hyper: &Value, tensors: &Tensors) -> Result<Box<dyn Scorer>>,
    },
    /// Predicts ratings: task rating.
    Rating {
        /// To fit.
        build: fn(hyper: Value) -> Result<Box<dyn RatingRecommender>>,
        /// From a file.
        load: fn(hyper: &Value, fields: &FieldSet, tensors: &Tensors) -> Result<Box<dyn Predictor>>,
    },
}

/// The backbones in the order of the docs.
pub static BACKBONES: &[Backbone] = &[
    // Baselines, in closed form or by alternating least squares.
    super::popularity::BACKBONE,
    super::item_knn::BACKBONE,
    super::ials::BACKBONE,
    super::gf_cf::BACKBONE,
    super::ease::BACKBONE,
    // Direct top-k.
    super::mf::BACKBONE,
    super::lightgcn::BACKBONE,
    super::mixgcf::BACKBONE,
    super::sgl::BACKBONE,
    // Sequential top-k.
    super::sasrec::BACKBONE,
    super::bert4rec::BACKBONE,
    super::cl4srec::BACKBONE,
    // Rating.
    super::deepfm::BACKBONE,
    super::nfm::BACKBONE,
    super::dcn::BACKBONE,
    super::afm::BACKBONE,
    super::xdeepfm::BACKBONE,
    super::autoint::BACKBONE,
];

/// Models that stages of their own fit, since they read more than interactions; they are saved, loaded and used like the others.
pub static STAGED: &[Backbone] = &[crate::llm::item::BACKBONE];

/// The backbone of that name, also one of [`STAGED`]: what a saved model can be.
///
/// # Errors
/// As [`find`].
pub fn find_saved(name: &str) -> Result<&'static Backbone> {
    STAGED.iter().find(|b| b.name == name).map_or_else(|| find(name), Ok)
}

/// The backbone of that name.
///
/// # Errors
/// There is none (exit 78); the help names those there are and the nearest one.
pub fn find(name: &str) -> Result<&'static Backbone> {
    BACKBONES.iter().find(|b| b.name == name).ok_or_else(|| {
        let names: Vec<&str> = BACKBONES.iter().map(|b| b.name).collect();
        Error::spec(format!("there is no model `{name}`")).with_help(hyper::suggest(name, &names, "models"))
    })
}

impl Backbone {
    /// A recommender with the given hyper-parameters; what is not given has its default.
    ///
    /// # Errors
    /// A name that this backbone does not know, a value outside its range or of another type, a setting that has no
    /// effect beside the others; the backbone predicts ratings (exit 78).
    pub fn recommender(&self, given: &Value) -> Result<Box<dyn Recommender>> {
        hyper::check(self.name, &(self.schema)(), given)?;
        match &self.make {
            Make::Ranking { build, .. } => {
                idle::check(self.name, self.idle, given, &|given| Ok(build(given.clone())?.hyper()))?;
                build(given.clone())
            }
            Make::Rating { .. } => Err(self.of_another_kind("predicts ratings and does not rank items")),
        }
    }

    /// As [`Backbone::recommender`], for a backbone that predicts ratings.
    ///
    /// # Errors
    /// A name that this backbone does not know, a value outside its range or of another type, a setting that has no
    /// effect beside the others; the backbone ranks items (exit 78).
    pub fn rating_recommender(&self, given: &Value) -> Result<Box<dyn RatingRecommender>> {
        hyper::check(self.name, &(self.schema)(), given)?;
        match &self.make {
            Make::Rating { build, .. } => {
                idle::check(self.name, self.idle, given, &|given| Ok(build(given.clone())?.hyper()))?;
                build(given.clone())
            }
            Make::Ranking { .. } => Err(self.of_another_kind("ranks items and does not predict ratings")),
        }
    }

    /// The hyper-parameters in full, defaults filled in, whatever the backbone predicts.
    ///
    /// # Errors
    /// A name that this backbone does not know, a value outside its range or of another type (exit 78).
    pub fn hyper(&self, given: &Value) -> Result<Value> {
        match &self.make {
            Make::Ranking { .. } => Ok(self.recommender(given)?.hyper()),
            Make::Rating { .. } => Ok(self.rating_recommender(given)?.hyper()),
        }
    }

    fn of_another_kind(&self, what: &str) -> Error {
        let same = |b: &&Backbone| matches!(b.make, Make::Rating { .. }) != matches!(self.make, Make::Rating { .. });
        let names: Vec<String> = BACKBONES.iter().filter(same).map(|b| format!("`{}`", b.name)).collect();
        Error::spec(format!("model `{}` {what}", self.name)).with_help(format!("models that do: {}", names.join(", ")))
    }

    /// The fitted model of a file.
    ///
    /// # Errors
    /// A tensor is missing or has a wrong shape (exit 65).
    pub fn scorer(&self, hyper: &Value, tensors: &Tensors) -> Result<Box<dyn Scorer>> {
        match &self.make {
            Make::Ranking { load, .. } => load(hyper, tensors),
            Make::Rating { .. } => Err(self.of_another_kind("predicts ratings and does not rank items")),
        }
    }

    /// The fitted rating model of a file.
    ///
    /// # Errors
    /// A tensor is missing or has a wrong shape (exit 65).
    pub fn predictor(&self, hyper: &Value, fields: &FieldSet, tensors: &Tensors) -> Result<Box<dyn Predictor>> {
        match &self.make {
            Make::Rating { load, .. } => load(hyper, fields, tensors),
            Make::Ranking { .. } => Err(self.of_another_kind("ranks items and does not predict ratings")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn names_are_file_names_and_unique() {
        for (n, backbone) in BACKBONES.iter().enumerate() {
            assert!(BACKBONES[..n].iter().all(|b| b.name != backbone.name), "{} twice", backbone.name);
            let file = std::path::Path::new(file!()).with_file_name(format!("{}.rs", backbone.name));
            assert!(file.exists(), "{} is missing", file.display());
            assert!(backbone.about.len() > 20, "{} says too little about itself", backbone.name);
        }
    }

    #[test]
    fn every_hyper_parameter_is_documented_and_has_a_default() {
        for backbone in BACKBONES {
            let schema = (backbone.schema)();
            let defaults = backbone.hyper(&json!({})).unwrap();
            let properties = schema.get("properties").unwrap().as_object().unwrap();
            assert!(!properties.is_empty());
            for (name, property) in properties {
                assert!(property["description"].as_str().is_some(), "{}.{name} has no docs", backbone.name);
                assert!(defaults.get(name).is_some(), "{}.{name} has no default", backbone.name);
            }
            // The defaults must pass the check that they are used to document.
            backbone.hyper(&defaults).unwrap();
        }
    }

    #[test]
    fn an_unknown_model_is_named_with_the_nearest_one() {
        let error = find("lightgnc").err().unwrap();
        assert_eq!(error.fault.exit_code(), 78);
        assert!(error.message.contains("`lightgnc`"));
        assert!(error.help.unwrap().contains("`lightgcn`"));
    }
}
