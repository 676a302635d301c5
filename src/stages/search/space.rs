//! The space of a search: what each hyper-parameter may be, and settings drawn from it.
//!
//! In: the `space` and `fixed` tables of the config, checked against the model. Out: settings, a function of the seed.

use std::collections::BTreeMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::recommenders::Backbone;

/// What one hyper-parameter may be.
#[derive(Clone, Debug, PartialEq)]
enum Range {
    /// One of these, each with the same probability.
    Choice(Vec<Value>),
    /// A number between two, each with the same probability.
    Uniform(f64, f64),
    /// A number between two, uniform in its logarithm.
    Log(f64, f64),
    /// An integer between two, both included.
    Int(i64, i64),
    /// An integer between two, uniform in its logarithm.
    LogInt(i64, i64),
}

/// What each hyper-parameter of a search may be.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Space(BTreeMap<String, Range>);

const FORMS: &str = "write a list of choices, or { uniform = [0, 1] }, { log = [1e-4, 1e-2] }, { int = [16, 128] } or { log_int = [16, 512] }";

impl Range {
    fn parse(name: &str, value: &Value) -> Result<Range> {
        let wrong = |why: &str| Error::spec(format!("the space of `{name}` {why}")).with_help(FORMS);
        if let Value::Array(choices) = value {
            return match choices.is_empty() {
                true => Err(wrong("has no choice")),
                false => Ok(Range::Choice(choices.clone())),
            };
        }
        let only = value.as_object().filter(|map| map.len() == 1).and_then(|map| map.iter().next());
        let Some((form, bounds)) = only else { return Err(wrong("is no list and no table of one key")) };
        let bounds = bounds.as_array().map(Vec::as_slice).unwrap_or_default();
        let [low, high] = bounds else { return Err(wrong(&format!("needs two numbers after `{form}`"))) };
        let real = || low.as_f64().zip(high.as_f64()).filter(|(low, high)| low <= high);
        let whole = || low.as_i64().zip(high.as_i64()).filter(|(low, high)| low <= high);
        let bad = || wrong(&format!("needs `{form} = [low, high]` with low at most high"));
        match form.as_str() {
            "uniform" => real().map(|(a, b)| Range::Uniform(a, b)).ok_or_else(bad),
            "int" => whole().map(|(a, b)| Range::Int(a, b)).ok_or_else(bad),
            "log" | "log_int" if low.as_f64().is_none_or(|low| low <= 0.0) => {
                Err(wrong(&format!("needs numbers above 0 after `{form}`")))
            }
            "log" => real().map(|(a, b)| Range::Log(a, b)).ok_or_else(bad),
            "log_int" => whole().map(|(a, b)| Range::LogInt(a, b)).ok_or_else(bad),
            other => Err(wrong(&format!("has the unknown form `{other}`"))),
        }
    }

    /// The values that show whether all of them are allowed.
    fn ends(&self) -> Vec<Value> {
        match self {
            Range::Choice(choices) => choices.clone(),
            Range::Uniform(a, b) | Range::Log(a, b) => vec![json!(a), json!(b)],
            Range::Int(a, b) | Range::LogInt(a, b) => vec![json!(a), json!(b)],
        }
    }

    fn draw(&self, rng: &mut ChaCha8Rng) -> Value {
        match self {
            Range::Choice(choices) => choices[rng.random_range(0..choices.len())].clone(),
            Range::Uniform(a, b) => json!(readable(rng.random_range(*a..=*b), *a, *b)),
            Range::Log(a, b) => json!(readable(rng.random_range(a.ln()..=b.ln()).exp(), *a, *b)),
            Range::Int(a, b) => json!(rng.random_range(*a..=*b)),
            Range::LogInt(a, b) => {
                let drawn = rng.random_range((*a as f64).ln()..=(*b as f64).ln()).exp().round() as i64;
                json!(drawn.clamp(*a, *b))
            }
        }
    }
}

/// Four significant digits, inside the bounds: a setting is read and typed by people.
fn readable(value: f64, low: f64, high: f64) -> f64 {
    let rounded: f64 = format!("{value:.3e}").parse().unwrap_or(value);
    rounded.clamp(low, high)
}

impl Space {
    /// Reads and checks a space.
    ///
    /// # Errors
    /// A form that there is not; a name that the model does not know, or that is fixed too; an end outside the range
    /// of the hyper-parameter (exit 78).
    pub fn new(space: &Map<String, Value>, fixed: &Map<String, Value>, backbone: &Backbone) -> Result<Self> {
        let mut ranges = BTreeMap::new();
        for (name, value) in space {
            if fixed.contains_key(name) {
                return Err(Error::spec(format!("`{name}` is both in `space` and in `fixed`")));
            }
            let range = Range::parse(name, value)?;
            for end in range.ends() {
                let mut hyper = fixed.clone();
                hyper.insert(name.clone(), end);
                backbone.hyper(&Value::Object(hyper))?;
            }
            ranges.insert(name.clone(), range);
        }
        Ok(Space(ranges))
    }

    /// Whether there is only one setting: that of the defaults and what is fixed.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Distinct settings, as many as asked for or as there are: a function of the seed and of the names and ranges,
    /// in which the first trials do not depend on how many follow.
    pub fn draw(&self, seed: u64, trials: usize) -> Vec<Map<String, Value>> {
        let mut drawn: Vec<Map<String, Value>> = Vec::new();
        // A space with few settings runs out of new ones; this many misses in a row mean that it has.
        let mut misses = 0;
        for stream in 0.. {
            if drawn.len() == trials || misses == 200 {
                break;
            }
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(stream);
            let setting = self.0.iter().map(|(name, range)| (name.clone(), range.draw(&mut rng))).collect();
            match drawn.contains(&setting) {
                true => misses += 1,
                false => {
                    drawn.push(setting);
                    misses = 0;
                }
            }
        }
        drawn
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recommenders::registry;
    use proptest::prelude::*;

    fn space(space: Value, fixed: Value) -> Result<Space> {
        let map = |v: Value| v.as_object().cloned().unwrap();
        Space::new(&map(space), &map(fixed), registry::find("lightgcn").unwrap())
    }

    #[test]
    fn settings_are_distinct_and_run_out() {
        let small = space(json!({"layers": [1, 2, 3], "epochs": {"int": [4, 5]}}), json!({})).unwrap();
        let drawn = small.draw(7, 100);
        assert_eq!(drawn.len(), 6);
        assert_eq!(small.draw(7, 3), drawn[..3]);
        assert_ne!(small.draw(8, 6), drawn);
        let nothing = space(json!({}), json!({"layers": 2})).unwrap();
        assert!(nothing.is_empty());
        assert_eq!(nothing.draw(7, 20), [Map::new()]);
    }

    proptest! {
        #[test]
        fn values_stay_inside_their_ranges(seed in any::<u64>()) {
            let ranges = json!({
                "learning_rate": {"log": [0.0003, 0.02]}, "l2": {"uniform": [0.1, 0.7]},
                "embedding_dim": {"log_int": [3, 100]}, "layers": {"int": [2, 4]},
            });
            for setting in space(ranges, json!({})).unwrap().draw(seed, 5) {
                let number = |name: &str| setting[name].as_f64().unwrap();
                prop_assert!((0.0003..=0.02).contains(&number("learning_rate")));
                prop_assert!((0.1..=0.7).contains(&number("l2")));
                prop_assert!((3.0..=100.0).contains(&number("embedding_dim")) && setting["embedding_dim"].is_i64());
                prop_assert!((2.0..=4.0).contains(&number("layers")));
            }
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (given, fixed, word) in [
            (json!({"layer": [1]}), json!({}), "`layer`"),
            (json!({"layers": []}), json!({}), "`layers`"),
            (json!({"layers": [1, 99]}), json!({}), "99"),
            (json!({"layers": ["two"]}), json!({}), "`layers`"),
            (json!({"layers": {"int": [3, 1]}}), json!({}), "at most"),
            (json!({"layers": {"int": [1]}}), json!({}), "two numbers"),
            (json!({"layers": {"normal": [1, 2]}}), json!({}), "`normal`"),
            (json!({"layers": 3}), json!({}), "no list"),
            (json!({"l2": {"log": [0.0, 1.0]}}), json!({}), "above 0"),
            (json!({"l2": {"uniform": [0.0, 99.0]}}), json!({}), "`l2`"),
            (json!({"layers": [1]}), json!({"layers": 2}), "both"),
        ] {
            let error = space(given.clone(), fixed).err().unwrap_or_else(|| panic!("{given} was taken"));
            assert!(error.fault.exit_code() == 78 && error.message.contains(word), "{given}: {error}");
        }
    }
}
