//! Hyper-parameters as given in the pipeline file against the schema of the chosen backbone.
//!
//! In: the schema that schemars makes of the backbone's config struct, and a JSON object.
//! Out: nothing, or an error (exit 78) that names the key, the value, what is allowed and the
//! nearest right name.

use schemars::Schema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Error, Result};

/// Checks names, types and ranges.
///
/// # Errors
/// Exit 78; all mistakes in one message, one a line.
pub fn check(model: &str, schema: &Schema, given: &Value) -> Result<()> {
    let Some(given) = given.as_object() else {
        return Err(Error::spec("`hyper` is not a table").with_help("write `[stages.NAME.hyper]` and one key a line"));
    };
    let none = serde_json::Map::new();
    let known = schema.get("properties").and_then(Value::as_object).unwrap_or(&none);
    let names: Vec<&str> = known.keys().map(String::as_str).collect();
    let mut mistakes = Vec::new();
    let mut help = None;
    for (key, value) in given {
        let Some(property) = known.get(key) else {
            mistakes.push(format!("`{key}` is not a hyper-parameter of `{model}`"));
            help.get_or_insert_with(|| suggest(key, &names, &format!("hyper-parameters of `{model}`")));
            continue;
        };
        if let Some(wanted) = type_mistake(property, value) {
            mistakes.push(format!("hyper-parameter `{key}` of `{model}` is {value}, {wanted} is wanted"));
        } else if let Some(allowed) = range_mistake(property, value) {
            mistakes.push(format!("hyper-parameter `{key}` of `{model}` is {value}, allowed is {allowed}"));
        }
    }
    match mistakes.is_empty() {
        true => Ok(()),
        false => {
            let error = Error::spec(mistakes.join("\n"));
            Err(match help {
                Some(help) => error.with_help(help),
                None => error,
            })
        }
    }
}

/// A checked JSON object as the backbone's config struct; what is not given is as in `T::default()`. (Serde's own
/// defaults would be those of a flattened part, not of the whole.)
///
/// # Errors
/// What serde finds that [`check`] does not look at (exit 78).
pub fn parse<T: DeserializeOwned + Serialize + Default>(model: &str, given: Value) -> Result<T> {
    parse_over(model, &T::default(), given)
}

/// The same over other defaults, where they depend on something that is given.
///
/// # Errors
/// As [`parse`].
pub fn parse_over<T: DeserializeOwned + Serialize>(model: &str, defaults: &T, given: Value) -> Result<T> {
    let mut full = to_json(defaults);
    if let (Value::Object(full), Value::Object(given)) = (&mut full, given) {
        full.extend(given);
    }
    serde_json::from_value(full)
        .map_err(|e| Error::spec(format!("the hyper-parameters of `{model}` cannot be read")).because(e))
}

/// A config struct as JSON, all fields.
pub fn to_json<T: Serialize>(hyper: &T) -> Value {
    serde_json::to_value(hyper).expect("a plain struct of numbers is JSON")
}

/// "did you mean `x`?" where a name is near enough, and all names there are.
pub fn suggest(typed: &str, names: &[&str], of_what: &str) -> String {
    let near = names
        .iter()
        .map(|name| (strsim::jaro_winkler(typed, name), *name))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(a.1)));
    let all: Vec<String> = names.iter().map(|n| format!("`{n}`")).collect();
    let all = format!("{of_what}: {}", all.join(", "));
    match near {
        Some((_, name)) => format!("did you mean `{name}`? {all}"),
        None => all,
    }
}

fn type_mistake(property: &Value, value: &Value) -> Option<&'static str> {
    let names: Vec<&str> = match property.get("type") {
        Some(Value::String(name)) => vec![name],
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => return None, // an enum or a reference: left to serde
    };
    let mut wanted = "another type";
    for name in names {
        let (fits, text) = match name {
            // A schema's integers are all unsigned here; a negative one fails the range check by name.
            "integer" => (value.is_i64() || value.is_u64(), "an integer"),
            "number" => (value.is_number(), "a number"),
            "boolean" => (value.is_boolean(), "true or false"),
            "string" => (value.is_string(), "a string"),
            "array" => (value.is_array(), "a list"),
            "null" => (value.is_null(), wanted),
            _ => (true, wanted),
        };
        if fits {
            return None;
        }
        wanted = text;
    }
    Some(wanted)
}

fn range_mistake(property: &Value, value: &Value) -> Option<String> {
    let value = value.as_f64()?;
    let bound = |name: &str| property.get(name).and_then(Value::as_f64);
    let (low, high, above) = (bound("minimum"), bound("maximum"), bound("exclusiveMinimum"));
    let bad = low.is_some_and(|b| value < b) || high.is_some_and(|b| value > b) || above.is_some_and(|b| value <= b);
    bad.then(|| match (low.or(above), high) {
        (Some(low), Some(high)) => format!("{low} to {high}"),
        (Some(low), None) => format!("{low} or more"),
        (None, Some(high)) => format!("{high} or less"),
        (None, None) => "another value".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::registry;
    use serde_json::json;

    fn error_of(given: serde_json::Value) -> crate::error::Error {
        registry::find("lightgcn").unwrap().recommender(&given).err().expect("a mistake must be found")
    }

    #[test]
    fn an_unknown_name_is_named_with_those_there_are() {
        let error = error_of(json!({"layer": 3}));
        assert_eq!(error.fault.exit_code(), 78);
        assert!(error.message.contains("`layer`"), "{error}");
        let help = error.help.unwrap();
        assert!(help.contains("did you mean `layers`?") && help.contains("`embedding_dim`"), "{help}");
    }

    #[test]
    fn a_name_like_no_other_gets_the_list_only() {
        let help = error_of(json!({"zzz": 3})).help.unwrap();
        assert!(!help.contains("did you mean") && help.contains("`layers`"), "{help}");
    }

    #[test]
    fn a_name_of_another_model_is_unknown() {
        assert!(registry::find("mf").unwrap().recommender(&json!({"layers": 3})).is_err());
        assert!(registry::find("lightgcn").unwrap().recommender(&json!({"layers": 3})).is_ok());
    }

    #[test]
    fn types_and_ranges_are_checked_and_all_mistakes_told() {
        let message = error_of(json!({"layers": 99, "embedding_dim": "wide", "learning_rate": -1})).message;
        assert_eq!(message.lines().count(), 3, "{message}");
        assert!(message.contains("`layers`") && message.contains("99"), "{message}");
        assert!(message.contains("an integer is wanted"), "{message}");
        assert!(message.contains("`learning_rate`"), "{message}");
        assert!(error_of(json!([1])).message.contains("not a table"));
        assert!(error_of(json!({"epochs": -3})).message.contains("`epochs`"));
        assert!(error_of(json!({"epochs": 2.5})).message.contains("an integer is wanted"));
    }

    #[test]
    fn what_is_given_replaces_the_default() {
        let hyper = registry::find("lightgcn").unwrap().recommender(&json!({"layers": 2})).unwrap().hyper();
        assert_eq!(hyper["layers"], 2);
        assert_eq!(hyper["embedding_dim"], 128);
    }
}
