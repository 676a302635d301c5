//! Checks a tree against a JSON Schema that schemars made, and says where it is wrong.
//!
//! In: an [`Item`] and a schema. Out: the JSON that serde reads, and all mistakes: unknown keys
//! (with the nearest right one), wrong types, values out of range, words that aren't allowed,
//! missing keys. It knows the part of JSON Schema that plain structs, maps, lists, options and
//! string enums give; that is all that the pipeline file has.

use serde_json::{Map, Value};

use super::diagnostics::{Diagnostic, list};
use super::document::{Entry, Item, ItemValue};

/// Longest chain of `$ref` and `allOf` that is followed.
const LONGEST_CHAIN: usize = 16;

/// What a schema says of a value, with references followed.
#[derive(Clone, Debug, Default)]
pub struct Shape<'a> {
    /// The schema's own keywords.
    pub keywords: Option<&'a Map<String, Value>>,
    /// Allowed types without `null`; empty: any.
    pub types: Vec<&'a str>,
    /// The words that a string enum allows, with their descriptions.
    pub choices: Vec<(&'a str, Option<&'a str>)>,
}

impl<'a> Shape<'a> {
    /// The shape of `schema`, whose `$ref`s lead into `root`.
    pub fn of(schema: &'a Value, root: &'a Value) -> Shape<'a> {
        let mut current = schema;
        for _ in 0..LONGEST_CHAIN {
            let Some(keywords) = current.as_object() else { return Shape::default() };
            let follow = |options: &'a Value| {
                let mut real = options.as_array().into_iter().flatten().filter(|o| !is_null(o));
                (real.next(), real.next())
            };
            if let Some(reference) = keywords.get("$ref").and_then(Value::as_str) {
                match reference.strip_prefix('#').and_then(|p| root.pointer(p)) {
                    Some(target) => current = target,
                    None => return Shape::default(),
                }
            } else if let Some((Some(only), None)) = keywords.get("anyOf").or_else(|| keywords.get("allOf")).map(follow)
            {
                current = only;
            } else {
                let choices = choices(keywords);
                let types = match keywords.get("type") {
                    Some(Value::String(one)) => vec![one.as_str()],
                    Some(Value::Array(many)) => {
                        many.iter().filter_map(Value::as_str).filter(|t| *t != "null").collect()
                    }
                    _ if !choices.is_empty() => vec!["string"],
                    _ if keywords.contains_key("properties") => vec!["object"],
                    _ => Vec::new(),
                };
                return Shape { keywords: Some(keywords), types, choices };
            }
        }
        Shape::default()
    }

    /// A keyword of the schema.
    pub fn keyword(&self, name: &str) -> Option<&'a Value> {
        self.keywords.and_then(|k| k.get(name))
    }

    /// The keys of an object and their schemas.
    pub fn properties(&self) -> impl Iterator<Item = (&'a str, &'a Value)> + use<'a> {
        self.keyword("properties").and_then(Value::as_object).into_iter().flatten().map(|(k, v)| (k.as_str(), v))
    }

    /// The keys that must be there.
    pub fn required(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.keyword("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
    }

    /// Smallest and largest number, the format's own limits included.
    pub fn range(&self) -> (Option<f64>, Option<f64>) {
        let number = |name| self.keyword(name).and_then(Value::as_f64);
        let (low, high) = match self.keyword("format").and_then(Value::as_str) {
            Some("uint8") => (Some(0.0), Some(f64::from(u8::MAX))),
            Some("uint16") => (Some(0.0), Some(f64::from(u16::MAX))),
            Some("uint32") => (Some(0.0), Some(f64::from(u32::MAX))),
            Some("uint" | "uint64") => (Some(0.0), None),
            Some("int8") => (Some(f64::from(i8::MIN)), Some(f64::from(i8::MAX))),
            Some("int16") => (Some(f64::from(i16::MIN)), Some(f64::from(i16::MAX))),
            Some("int32") => (Some(f64::from(i32::MIN)), Some(f64::from(i32::MAX))),
            _ => (None, None),
        };
        (number("minimum").or(low), number("maximum").or(high))
    }
}

fn is_null(schema: &Value) -> bool {
    schema.get("type").and_then(Value::as_str) == Some("null")
}

/// The words of `const`, `enum`, or a `oneOf` of those.
fn choices(keywords: &Map<String, Value>) -> Vec<(&str, Option<&str>)> {
    let about = keywords.get("description").and_then(Value::as_str);
    if let Some(word) = keywords.get("const").and_then(Value::as_str) {
        return vec![(word, about)];
    }
    if let Some(words) = keywords.get("enum").and_then(Value::as_array) {
        return words.iter().filter_map(Value::as_str).map(|w| (w, None)).collect();
    }
    let options = keywords.get("oneOf").and_then(Value::as_array).into_iter().flatten();
    options.filter_map(Value::as_object).flat_map(choices).collect()
}

/// A schema's type with its article, for messages.
pub fn type_name(schema_type: &str) -> &str {
    match schema_type {
        "string" => "a string",
        "integer" => "an integer",
        "number" => "a number",
        "boolean" => "a boolean",
        "array" => "a list",
        "object" => "a table",
        other => other,
    }
}

/// The first sentence of a doc comment on one line.
pub fn first_sentence(description: &str) -> String {
    let text = description.split("\n\n").next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
    match text.find(". ") {
        Some(end) => text[..end].to_owned(),
        None => text.trim_end_matches('.').to_owned(),
    }
}

/// Checks `item`, which stands at `path` (dotted, empty for the whole file), against `schema`.
/// Returns the JSON to read; it is whole only where no mistake was added to `out`.
pub fn check(item: &Item, path: &str, schema: &Value, out: &mut Vec<Diagnostic>) -> Value {
    Walk { root: schema, out }.value(item, path, schema)
}

struct Walk<'a> {
    /// The schema that `$ref`s lead into.
    root: &'a Value,
    out: &'a mut Vec<Diagnostic>,
}

impl<'a> Walk<'a> {
    fn value(&mut self, item: &Item, path: &str, schema: &'a Value) -> Value {
        let shape = Shape::of(schema, self.root);
        let wants = |t: &str| shape.types.contains(&t);
        if shape.types.is_empty() {
            return item.to_json();
        }
        match &item.value {
            ItemValue::Invalid => Value::Null,
            ItemValue::String(text) if wants("string") => self.string(text, item, path, &shape),
            ItemValue::Integer(n) if wants("integer") || wants("number") => {
                self.number(*n as f64, item, path, &shape);
                if wants("integer") { (*n).into() } else { (*n as f64).into() }
            }
            ItemValue::Float(x) if wants("number") => {
                self.number(*x, item, path, &shape);
                (*x).into()
            }
            ItemValue::Boolean(b) if wants("boolean") => (*b).into(),
            ItemValue::Array(items) if wants("array") => self.array(items, item, path, &shape),
            ItemValue::Table(entries) if wants("object") => self.table(entries, item, path, &shape),
            _ => match other_reading(item, &shape) {
                Some(read) => self.value(&read, path, schema),
                None => {
                    self.wrong_type(item, path, schema, &shape);
                    Value::Null
                }
            },
        }
    }

    fn wrong_type(&mut self, item: &Item, path: &str, schema: &Value, shape: &Shape<'_>) {
        let wanted = match shape.choices.is_empty() {
            true => shape.types.iter().map(|t| type_name(t)).collect::<Vec<_>>().join(" or "),
            false => format!("one of {}", list(shape.choices.iter().map(|c| c.0))),
        };
        let mut mistake = Diagnostic::new(
            format!("`{path}` has the wrong type"),
            item.origin.clone(),
            format!("expected {wanted}, found {}", item.type_name()),
        );
        if let Some(about) = schema.get("description").and_then(Value::as_str) {
            mistake = mistake.with_help(format!("`{}`: {}", last_key(path), first_sentence(about)));
        }
        self.out.push(mistake);
    }

    fn string(&mut self, text: &str, item: &Item, path: &str, shape: &Shape<'_>) -> Value {
        if !shape.choices.is_empty() && !shape.choices.iter().any(|(c, _)| *c == text) {
            let words: Vec<&str> = shape.choices.iter().map(|c| c.0).collect();
            let mut mistake = Diagnostic::new(
                format!("`{path}` cannot be `{text}`"),
                item.origin.clone(),
                format!("expected {}", or_list(&words)),
            )
            .with_suggestion(text, words.iter().copied(), "allowed");
            if mistake.help.is_empty() {
                mistake = mistake.with_help(format!("allowed: {}", list(words)));
            }
            self.out.push(mistake);
        }
        let letters = text.chars().count() as u64;
        let (least, most) = (self.limit(shape, "minLength"), self.limit(shape, "maxLength"));
        if let Some(wanted) = count_mistake(letters, least, most, "character") {
            self.out.push(Diagnostic::new(
                format!("`{path}` has {letters} characters"),
                item.origin.clone(),
                format!("expected {wanted}"),
            ));
        }
        text.into()
    }

    fn limit(&self, shape: &Shape<'_>, keyword: &str) -> Option<u64> {
        shape.keyword(keyword).and_then(Value::as_u64)
    }

    fn number(&mut self, x: f64, item: &Item, path: &str, shape: &Shape<'_>) {
        let (low, high) = shape.range();
        let above = |name| shape.keyword(name).and_then(Value::as_f64);
        let (over, under) = (above("exclusiveMinimum"), above("exclusiveMaximum"));
        let outside = low.is_some_and(|l| x < l)
            || high.is_some_and(|h| x > h)
            || over.is_some_and(|o| x <= o)
            || under.is_some_and(|u| x >= u);
        if outside {
            self.out.push(Diagnostic::new(
                format!("`{path}` is out of range: {x}"),
                item.origin.clone(),
                format!("expected {}", range_text(shape)),
            ));
        }
    }

    fn array(&mut self, items: &[Item], item: &Item, path: &str, shape: &Shape<'a>) -> Value {
        let (least, most) = (self.limit(shape, "minItems"), self.limit(shape, "maxItems"));
        if let Some(wanted) = count_mistake(items.len() as u64, least, most, "value") {
            self.out.push(Diagnostic::new(
                format!("`{path}` has {} values", items.len()),
                item.origin.clone(),
                format!("expected {wanted}"),
            ));
        }
        let first = shape.keyword("prefixItems").and_then(Value::as_array);
        let rest = shape.keyword("items");
        let check = |(i, item): (usize, &Item)| match first.and_then(|f| f.get(i)).or(rest) {
            Some(schema) => self.value(item, &format!("{path}.{i}"), schema),
            None => item.to_json(),
        };
        items.iter().enumerate().map(check).collect()
    }

    fn table(&mut self, entries: &[Entry], item: &Item, path: &str, shape: &Shape<'a>) -> Value {
        let mut json = Map::new();
        // A struct has properties and takes no others; a map has only a schema for its values.
        let is_struct = shape.keyword("properties").is_some();
        let others = shape.keyword("additionalProperties").filter(|o| o.is_object());
        for entry in entries {
            let below = if path.is_empty() { entry.key.clone() } else { format!("{path}.{}", entry.key) };
            let known = shape.properties().find(|(k, _)| *k == entry.key).map(|(_, s)| s);
            match known.or(others) {
                Some(schema) => {
                    json.insert(entry.key.clone(), self.value(&entry.item, &below, schema));
                }
                None if !is_struct && shape.keyword("additionalProperties") != Some(&Value::Bool(false)) => {
                    json.insert(entry.key.clone(), entry.item.to_json());
                }
                None => self.unknown_key(entry, path, shape),
            }
        }
        for key in shape.required().filter(|k| !entries.iter().any(|e| e.key == *k)) {
            let schema = shape.properties().find(|(k, _)| *k == key).map(|(_, s)| s);
            self.missing_key(key, schema, item, path);
        }
        Value::Object(json)
    }

    fn unknown_key(&mut self, entry: &Entry, path: &str, shape: &Shape<'a>) {
        let place = if path.is_empty() { "at the top of the file".to_owned() } else { format!("in `{path}`") };
        let mut mistake = Diagnostic::new(
            format!("unknown key `{}` {place}", entry.key),
            entry.key_origin.clone(),
            "nothing reads this key",
        );
        // The right key in the wrong table: it may belong one table further down.
        let inner = shape
            .properties()
            .find(|(_, schema)| Shape::of(schema, self.root).properties().any(|(k, _)| k == entry.key));
        mistake = match inner {
            Some((table, _)) => {
                mistake.with_help(format!("it belongs in `{table}`: write `{table}.{} = ...`", entry.key))
            }
            None => mistake.with_suggestion(&entry.key, shape.properties().map(|p| p.0), "the keys here are"),
        };
        self.out.push(mistake);
    }

    fn missing_key(&mut self, key: &str, schema: Option<&'a Value>, item: &Item, path: &str) {
        let place = if path.is_empty() { "the file".to_owned() } else { format!("`{path}`") };
        let mut mistake = Diagnostic::new(
            format!("{place} lacks the key `{key}`"),
            item.origin.clone(),
            format!("`{key}` is missing"),
        );
        if let Some(schema) = schema {
            let shape = Shape::of(schema, self.root);
            let example = match (shape.choices.first(), shape.types.first().copied()) {
                (Some((word, _)), _) => format!("\"{word}\""),
                (None, Some("string")) => "\"...\"".to_owned(),
                (None, Some("array")) => "[...]".to_owned(),
                (None, Some("object")) => "{ ... }".to_owned(),
                _ => "...".to_owned(),
            };
            let about = schema.get("description").and_then(Value::as_str).map(first_sentence).unwrap_or_default();
            let colon = if about.is_empty() { "" } else { ": " };
            mistake = mistake.with_help(format!("add `{key} = {example}`{colon}{about}"));
        }
        self.out.push(mistake);
    }
}

/// The value read another way, where its text allows one: `--set x.day=2026` for a string, or a
/// template that made `10` for an integer.
fn other_reading(item: &Item, shape: &Shape<'_>) -> Option<Item> {
    let raw = item.raw.as_deref()?;
    let wants = |t: &str| shape.types.contains(&t);
    let is_text = matches!(item.value, ItemValue::String(_));
    let value = if wants("string") && !is_text {
        Some(ItemValue::String(raw.to_owned()))
    } else if !is_text {
        None
    } else {
        let raw = raw.trim();
        let integer = || raw.parse().ok().map(ItemValue::Integer).filter(|_| wants("integer"));
        let number = || {
            let parsed = raw.parse().ok().filter(|x: &f64| x.is_finite());
            parsed.map(ItemValue::Float).filter(|_| wants("number"))
        };
        let boolean = || raw.parse().ok().map(ItemValue::Boolean).filter(|_| wants("boolean"));
        integer().or_else(number).or_else(boolean)
    };
    value.map(|value| Item { value, origin: item.origin.clone(), raw: None })
}

/// A range in words, e.g. `1 to 8`, `at least 0`.
pub fn range_text(shape: &Shape<'_>) -> String {
    let over = shape.keyword("exclusiveMinimum").and_then(Value::as_f64);
    let under = shape.keyword("exclusiveMaximum").and_then(Value::as_f64);
    let (low, high) = shape.range();
    let lower = over.map(|o| format!("more than {o}")).or_else(|| low.map(|l| format!("at least {l}")));
    let upper = under.map(|u| format!("less than {u}")).or_else(|| high.map(|h| format!("at most {h}")));
    match (low, high, lower, upper) {
        (Some(low), Some(high), _, _) if over.is_none() && under.is_none() => format!("{low} to {high}"),
        (_, _, Some(lower), Some(upper)) => format!("{lower} and {upper}"),
        (_, _, Some(one), None) | (_, _, None, Some(one)) => one,
        _ => String::new(),
    }
}

/// What was expected where `count` is outside of the limits.
fn count_mistake(count: u64, least: Option<u64>, most: Option<u64>, what: &str) -> Option<String> {
    if least.is_none_or(|l| count >= l) && most.is_none_or(|m| count <= m) {
        return None;
    }
    let plural = |n: u64| if n == 1 { format!("{n} {what}") } else { format!("{n} {what}s") };
    Some(match (least, most) {
        (Some(l), Some(m)) if l == m => format!("exactly {}", plural(l)),
        (Some(l), Some(m)) => format!("{l} to {}", plural(m)),
        (Some(l), None) => format!("at least {}", plural(l)),
        (None, Some(m)) => format!("at most {}", plural(m)),
        (None, None) => String::new(),
    })
}

fn or_list(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [one] => format!("`{one}`"),
        [first @ .., last] => format!("{} or `{last}`", list(first.iter().copied())),
    }
}

fn last_key(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::parse::{apply_sets, parse_document};
    use schemars::JsonSchema;
    use serde::Deserialize;
    use std::collections::BTreeMap;

    #[derive(Debug, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Config {
        /// Which table is read. It is a reference.
        input: String,
        #[serde(default)]
        strategy: Option<Strategy>,
        #[serde(default)]
        #[schemars(range(min = 1, max = 8))]
        layers: Option<u32>,
        #[serde(default)]
        #[schemars(range(min = 0.0, max = 1.0))]
        share: f64,
        #[serde(default)]
        inputs: BTreeMap<String, String>,
        #[serde(default)]
        tags: Vec<String>,
        #[serde(default)]
        hyper: Option<Hyper>,
        #[serde(default)]
        deep: bool,
    }

    #[derive(Debug, Deserialize, JsonSchema)]
    #[serde(rename_all = "kebab-case")]
    enum Strategy {
        /// The last one.
        LeaveOneOut,
        GlobalTime,
        Random,
    }

    #[derive(Debug, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Hyper {
        rate: f32,
    }

    fn run(text: &str) -> (Value, Vec<String>) {
        let schema = schemars::schema_for!(Config).to_value();
        let mut out = Vec::new();
        let root = parse_document(text, &mut out).unwrap();
        let json = check(&root, "s", &schema, &mut out);
        (json, out.iter().map(|d| format!("{} / {} / {}", d.message, d.labels[0].text, d.help.join("; "))).collect())
    }

    #[test]
    fn a_right_config_is_read_as_it_is() {
        let (json, out) = run("input = 'a'\nstrategy = 'global-time'\nlayers = 3\nshare = 1\n\
             inputs = { x = 'y' }\ntags = ['t']\nhyper = { rate = 1 }\ndeep = true\n");
        assert!(out.is_empty(), "{out:?}");
        let config: Config = serde_json::from_value(json).unwrap();
        assert_eq!(config.layers, Some(3));
        assert_eq!(config.share, 1.0);
        assert!(matches!(config.strategy, Some(Strategy::GlobalTime)));
    }

    #[test]
    fn every_mistake_is_named() {
        let (_, out) = run("strategy = 'leave-one-aut'\nlayers = 0\nshare = 'x'\ninputs = { x = 1 }\n\
             tags = [1]\nhyper = { rat = 1 }\nlayer = 2\nrate = 3\ndeep = 'no'\n");
        let wanted = [
            "`s.strategy` cannot be `leave-one-aut` / did you mean `leave-one-out`? / allowed: `leave-one-out`, `global-time`, `random`",
            "`s.layers` is out of range: 0 / expected 1 to 8 / ",
            "`s.share` has the wrong type / expected a number, found a string / ",
            "`s.inputs.x` has the wrong type / expected a string, found an integer / ",
            "`s.tags.0` has the wrong type / expected a string, found an integer / ",
            "unknown key `rat` in `s.hyper` / did you mean `rate`? / ",
            "`s.hyper` lacks the key `rate` / `rate` is missing / add `rate = ...`",
            "unknown key `layer` in `s` / did you mean `layers`? / ",
            "unknown key `rate` in `s` / nothing reads this key / it belongs in `hyper`: write `hyper.rate = ...`",
            "`s.deep` has the wrong type / expected a boolean, found a string / ",
            "`s` lacks the key `input` / `input` is missing / add `input = \"...\"`: Which table is read",
        ];
        let sorted = |v: Vec<String>| {
            let mut v = v;
            v.sort();
            v
        };
        assert_eq!(sorted(out), sorted(wanted.iter().map(|s| (*s).to_owned()).collect()));
    }

    #[test]
    fn a_float_is_no_integer_and_limits_of_formats_hold() {
        assert_eq!(run("input = 'a'\nlayers = 2.0").1.len(), 1);
        let schema =
            serde_json::json!({"type": "object", "properties": {"n": {"type": "integer", "format": "uint32"}}});
        let mut out = Vec::new();
        let root = parse_document("n = 4294967296", &mut out).unwrap();
        check(&root, "", &schema, &mut out);
        assert_eq!(out[0].labels[0].text, "expected 0 to 4294967295");
    }

    #[test]
    fn the_schema_decides_how_an_argument_is_read() {
        let schema = schemars::schema_for!(Config).to_value();
        let mut out = Vec::new();
        let mut root = parse_document("", &mut out).unwrap();
        let set = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        apply_sets(&mut root, &[set("input", "2026"), set("layers", "4"), set("share", "'0.5'")], &mut out);
        let json = check(&root, "", &schema, &mut out);
        assert_eq!(json["input"], "2026");
        assert_eq!(json["layers"], 4);
        assert_eq!(out.len(), 1, "a quoted number stays a string: {out:?}");
    }

    #[test]
    fn sentences() {
        assert_eq!(first_sentence("One thing\nand more. Another."), "One thing and more");
        assert_eq!(first_sentence("One.\n\nTwo."), "One");
    }
}
