//! The tree against the schemas: top-level keys, sources, and each stage by its `kind`.
//!
//! Second pass of two. In: the templated tree and the stage kinds. Out: configs as serde reads
//! them, with the places that later mistakes point to; mistakes of this pass are collected.

use schemars::schema_for;
use serde_json::{Map, Value, json};

use super::diagnostics::{Diagnostic, list};
use super::document::{Entry, Item, ItemValue, Origin};
use super::schema_walk::check;
use super::spec::{TopLevel, parse_bytes};
use super::unit_tests::UnitTest;
use crate::stages::StageKind;
use crate::tables::SourceConfig;

/// The top-level keys that hold tables of their own.
const SECTIONS: [&str; 4] = ["params", "sources", "stages", "test"];

/// A source of the file.
pub struct CheckedSource {
    /// Its name.
    pub name: String,
    /// Its config; `None` where mistakes were reported.
    pub config: Option<SourceConfig>,
}

impl CheckedSource {
    /// Whether it is an artifact and no table.
    pub fn is_artifact(&self) -> bool {
        self.config.as_ref().is_some_and(super::artifact_source::is_artifact)
    }
}

/// A stage of the file.
pub struct CheckedStage {
    /// Its name.
    pub name: String,
    /// Its own table, to find the places of keys.
    pub item: Item,
    /// Its kind and its config without `kind` and `seed`; `None` where mistakes were reported.
    pub config: Option<(&'static StageKind, Value)>,
    /// Its own `seed`, where it has one.
    pub seed: Option<u64>,
}

/// What this pass found.
pub struct Checked {
    /// The top-level keys; `None` where mistakes were reported.
    pub top: Option<TopLevel>,
    /// `memory_limit` in bytes.
    pub memory_limit: usize,
    /// The sources in the order of the file.
    pub sources: Vec<CheckedSource>,
    /// The stages in the order of the file.
    pub stages: Vec<CheckedStage>,
    /// The `[[test]]` blocks without mistakes, with their places.
    pub tests: Vec<(UnitTest, Item)>,
}

/// Checks the whole tree. `text` is the file's text.
pub fn validate(root: &Item, kinds: &'static [StageKind], text: &str, out: &mut Vec<Diagnostic>) -> Checked {
    let before = out.len();
    let mut json = check(root, "", &top_schema(), out);
    let (memory_limit, name_is_right) = top_values(root, out);
    if let Some(map) = json.as_object_mut() {
        SECTIONS.iter().for_each(|k| drop(map.shift_remove(*k)));
    }
    let whole = root.entries().iter().all(|e| SECTIONS.contains(&e.key.as_str()) || !e.item.is_broken());
    let top = match out.len() == before && name_is_right && whole {
        true => serde_json::from_value(json)
            .inspect_err(|e| out.push(Diagnostic::new(e.to_string(), Origin::File(0..0), "")))
            .ok(),
        // Mistakes at the top must not hide those of the stages' values: only the keys that
        // stages depend on matter to them, and those have defaults.
        false => fallback(root),
    };
    let sources = root.get("sources").map(Item::entries).unwrap_or_default();
    let stages = root.get("stages").map(Item::entries).unwrap_or_default();
    names(sources, stages, out);
    if root.get("stages").is_none_or(|s| matches!(&s.value, ItemValue::Table(t) if t.is_empty())) {
        let place = root.entry("stages").map_or(Origin::File(0..0), |e| e.item.origin.clone());
        out.push(
            Diagnostic::new("the pipeline has no stages", place, "")
                .with_help(format!("add one: `[stages.NAME]` with a `kind`, one of {}", kind_names(kinds))),
        );
    }
    let source_schema = schema_for!(SourceConfig).to_value();
    let sources = sources.iter().map(|e| source(e, &source_schema, out)).collect();
    let stages = stages.iter().map(|e| stage(e, kinds, text, out)).collect();
    let tests = tests(root, out);
    Checked { top, memory_limit, sources, stages, tests }
}

/// The schema of the file's top, in which sources and stages are only tables of tables.
fn top_schema() -> Value {
    let mut schema = schema_for!(TopLevel).to_value();
    if let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        properties.insert("params".to_owned(), json!({"type": "object"}));
        for section in ["sources", "stages"] {
            let tables = json!({"type": "object", "additionalProperties": {"type": "object"}});
            properties.insert(section.to_owned(), tables);
        }
        properties.insert("test".to_owned(), json!({"type": "array", "items": {"type": "object"}}));
    }
    schema
}

/// Values of the top level that a schema cannot say: the limit in bytes, and whether all is right.
fn top_values(root: &Item, out: &mut Vec<Diagnostic>) -> (usize, bool) {
    let before = out.len();
    let mut limit = parse_bytes("2GiB").unwrap_or(usize::MAX);
    if let Some(item) = root.get("memory_limit")
        && let Some(text) = item.as_str()
    {
        match parse_bytes(text) {
            Some(bytes) => limit = bytes,
            None => out.push(
                Diagnostic::new(format!("`memory_limit` cannot be `{text}`"), item.origin.clone(), "not a size")
                    .with_help("write a number and a unit: KB, MB, GB, KiB, MiB or GiB, for example \"2GiB\""),
            ),
        }
    }
    if let Some(item) = root.get("name")
        && let Some(name) = item.as_str()
    {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
        if !(name.is_empty() || first && name.chars().all(allowed)) {
            out.push(
                Diagnostic::new(format!("`name` cannot be `{name}`"), item.origin.clone(), "not a name")
                    .with_help("letters, digits, `_`, `-` and `.`, and a letter or digit first"),
            );
        }
    }
    (limit, out.len() == before)
}

/// The top level with what of it is right, so that the stages can be looked at all the same.
fn fallback(root: &Item) -> Option<TopLevel> {
    let text = |key: &str| root.get(key).and_then(Item::as_str);
    let mut json = Map::new();
    json.insert("name".to_owned(), "unnamed".into());
    if let Some(folder) = text("root") {
        json.insert("root".to_owned(), folder.into());
    }
    serde_json::from_value(Value::Object(json)).ok()
}

/// Names of sources and stages: their letters, and that none is there twice.
fn names(sources: &[Entry], stages: &[Entry], out: &mut Vec<Diagnostic>) {
    for entry in sources.iter().chain(stages) {
        if is_name(&entry.key) {
            continue;
        }
        let mut better: String = entry.key.to_lowercase();
        better = better.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        let mut mistake =
            Diagnostic::new(format!("`{}` cannot be a name", entry.key), entry.key_origin.clone(), "not a name")
                .with_help("names of sources and stages have lower-case letters, digits and `_`, and a letter first");
        if is_name(&better)
            && let Some(label) = mistake.labels.first_mut()
        {
            label.text = format!("write `{better}`");
        }
        out.push(mistake);
    }
    for stage in stages {
        if let Some(source) = sources.iter().find(|s| s.key == stage.key) {
            out.push(
                Diagnostic::new(
                    format!("`{}` is the name of a stage and of a source", stage.key),
                    stage.key_origin.clone(),
                    "duplicate name",
                )
                .also(source.key_origin.clone(), "the source")
                .with_help("rename one of them: references name both alike"),
            );
        }
    }
}

fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

fn source(entry: &Entry, schema: &Value, out: &mut Vec<Diagnostic>) -> CheckedSource {
    let name = entry.key.clone();
    if !matches!(entry.item.value, ItemValue::Table(_)) {
        return CheckedSource { name, config: None };
    }
    let before = out.len();
    let json = check(&entry.item, &format!("sources.{name}"), schema, out);
    mapped_twice(&entry.item, out);
    let config = match out.len() == before && !entry.item.is_broken() {
        true => serde_json::from_value(json)
            .inspect_err(|e| out.push(Diagnostic::new(e.to_string(), entry.item.origin.clone(), "in this source")))
            .ok(),
        false => None,
    };
    let config: Option<SourceConfig> = config;
    if config.as_ref().is_some_and(|c| !super::artifact_source::is_artifact(c)) {
        for key in ["max_age_days", "optional", "made_by"] {
            if let Some(found) = entry.item.entry(key) {
                out.push(
                    Diagnostic::new(
                        format!("`{key}` of source `{name}` is for artifacts"),
                        found.key_origin.clone(),
                        "not read",
                    )
                    .with_help("remove it, or set role = \"artifact\" where the source is a calibration or a model"),
                );
            }
        }
    }
    CheckedSource { name, config }
}

/// One column of the source cannot become two of ours.
fn mapped_twice(source: &Item, out: &mut Vec<Diagnostic>) {
    let columns = source.get("columns").map(Item::entries).unwrap_or_default();
    for (i, entry) in columns.iter().enumerate() {
        let same = |e: &&Entry| e.item.as_str().is_some() && e.item.as_str() == entry.item.as_str();
        if let Some(first) = columns[..i].iter().find(same) {
            out.push(
                Diagnostic::new(
                    format!("the column `{}` is mapped twice", entry.item.as_str().unwrap_or_default()),
                    entry.item.origin.clone(),
                    format!("to `{}`", entry.key),
                )
                .also(first.item.origin.clone(), format!("to `{}`", first.key))
                .with_help("make a second column in a `sql` stage"),
            );
        }
    }
}

fn stage(entry: &Entry, kinds: &'static [StageKind], text: &str, out: &mut Vec<Diagnostic>) -> CheckedStage {
    let name = entry.key.clone();
    let item = entry.item.clone();
    let nothing = |item| CheckedStage { name: name.clone(), item, config: None, seed: None };
    if !matches!(item.value, ItemValue::Table(_)) {
        return nothing(item);
    }
    let Some(kind_item) = item.get("kind") else {
        out.push(
            Diagnostic::new(format!("stage `{name}` has no `kind`"), item.origin.clone(), "`kind` is missing")
                .with_help(format!("add `kind = \"...\"`, one of {}", kind_names(kinds))),
        );
        return nothing(item);
    };
    let Some(kind_name) = kind_item.as_str() else {
        if !matches!(kind_item.value, ItemValue::Invalid) {
            let label = format!("expected a string, found {}", kind_item.type_name());
            out.push(
                Diagnostic::new(format!("`stages.{name}.kind` has the wrong type"), kind_item.origin.clone(), label)
                    .with_help(format!("the kinds are {}", kind_names(kinds))),
            );
        }
        return nothing(item);
    };
    let Some(kind) = kinds.iter().find(|k| k.name == kind_name) else {
        let origin = kind_item.origin.first_line(text);
        let mistake = Diagnostic::new(format!("unknown stage kind `{kind_name}`"), origin, "there is no such kind")
            .with_suggestion(kind_name, kinds.iter().map(|k| k.name), "the kinds are");
        out.push(mistake);
        return nothing(item);
    };
    let before = out.len();
    let mut json = check(&item, &format!("stages.{name}"), &stage_schema(kind), out);
    let mut seed = None;
    if let Some(map) = json.as_object_mut() {
        map.shift_remove("kind");
        seed = map.shift_remove("seed").and_then(|s| s.as_u64());
    }
    let whole = out.len() == before && !item.is_broken();
    let config = whole.then_some((kind, json));
    CheckedStage { name, item, config, seed }
}

/// The `[[test]]` blocks that are right by themselves.
fn tests(root: &Item, out: &mut Vec<Diagnostic>) -> Vec<(UnitTest, Item)> {
    let Some(ItemValue::Array(blocks)) = root.get("test").map(|i| &i.value) else { return Vec::new() };
    let schema = schema_for!(UnitTest).to_value();
    let mut tests = Vec::new();
    for (i, block) in blocks.iter().enumerate().filter(|(_, b)| matches!(b.value, ItemValue::Table(_))) {
        let before = out.len();
        let json = check(block, &format!("test.{i}"), &schema, out);
        if out.len() > before || block.is_broken() {
            continue;
        }
        match serde_json::from_value(json) {
            Ok(test) => tests.push((test, block.clone())),
            Err(e) => out.push(Diagnostic::new(e.to_string(), block.origin.clone(), "in this test")),
        }
    }
    tests
}

/// The schema of a whole `[stages.NAME]` table: the kind's own keys, `kind` and `seed`.
pub fn stage_schema(kind: &StageKind) -> Value {
    let mut schema = (kind.schema)().to_value();
    let Some(map) = schema.as_object_mut() else { return schema };
    let own = match map.shift_remove("properties") {
        Some(Value::Object(own)) => own,
        _ => Map::new(),
    };
    let mut properties = Map::new();
    let about = json!({"type": "string", "const": kind.name, "description": kind.about});
    properties.insert("kind".to_owned(), about);
    properties.extend(own);
    properties.insert(
        "seed".to_owned(),
        json!({
            "type": "integer", "minimum": 0,
            "description": "Seed of this stage. By default it is made from the pipeline's seed and the stage's name.",
        }),
    );
    map.insert("properties".to_owned(), Value::Object(properties));
    map.insert("additionalProperties".to_owned(), Value::Bool(false));
    let mut all = vec![Value::from("kind")];
    if let Some(Value::Array(own)) = map.shift_remove("required") {
        all.extend(own);
    }
    map.insert("required".to_owned(), Value::Array(all));
    schema
}

fn kind_names(kinds: &[StageKind]) -> String {
    list(kinds.iter().map(|k| k.name))
}
