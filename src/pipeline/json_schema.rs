//! JSON Schema (draft 2020-12) of a whole pipeline file, for editors: `tailfuse schema`.
//!
//! In: the types that validation reads too. Out: one document, in which a stage is one of the
//! kinds by its `kind`.

use schemars::schema_for;
use serde_json::{Map, Value, json};

use super::spec::TopLevel;
use super::unit_tests::UnitTest;
use super::validate::stage_schema;
use crate::stages::{KINDS, StageKind};
use crate::tables::SourceConfig;

/// What names of sources and stages look like.
const NAME: &str = "^[a-z][a-z0-9_]*$";

/// The schema of a pipeline file with all stage kinds.
pub fn json_schema() -> Value {
    json_schema_of(KINDS)
}

/// The schema of a pipeline file with the given stage kinds.
pub fn json_schema_of(kinds: &[StageKind]) -> Value {
    let mut definitions = Map::new();
    let mut top = schema_for!(TopLevel).to_value();
    hoist(&mut top, "", &mut definitions);
    let mut source = schema_for!(SourceConfig).to_value();
    hoist(&mut source, "source.", &mut definitions);
    definitions.insert("source".to_owned(), bare(source));
    let mut test = schema_for!(UnitTest).to_value();
    hoist(&mut test, "test.", &mut definitions);
    definitions.insert("test".to_owned(), bare(test));
    let mut options = Vec::new();
    for kind in kinds {
        let mut schema = stage_schema(kind);
        hoist(&mut schema, &format!("{}.", kind.name), &mut definitions);
        let name = format!("stage.{}", kind.name);
        let mut schema = bare(schema);
        if let Some(map) = schema.as_object_mut() {
            map.insert("title".to_owned(), kind.name.into());
            map.insert("description".to_owned(), kind.about.into());
        }
        definitions.insert(name.clone(), schema);
        options.push(json!({"$ref": format!("#/$defs/{name}")}));
    }
    let mut properties = match top.get_mut("properties").map(Value::take) {
        Some(Value::Object(properties)) => properties,
        _ => Map::new(),
    };
    properties.insert("params".to_owned(), params_schema());
    properties.insert(
        "sources".to_owned(),
        json!({
            "description": "The tables that are read: `[sources.NAME]`.",
            "type": "object",
            "propertyNames": {"pattern": NAME},
            "additionalProperties": {"$ref": "#/$defs/source"},
        }),
    );
    let any_stage = if options.is_empty() { json!({"type": "object"}) } else { json!({"oneOf": options}) };
    properties.insert(
        "stages".to_owned(),
        json!({
            "description": "The work, wired by references: `[stages.NAME]`.",
            "type": "object",
            "minProperties": 1,
            "propertyNames": {"pattern": NAME},
            "additionalProperties": any_stage,
        }),
    );
    properties.insert(
        "test".to_owned(),
        json!({
            "description": "Tests of single stages, run by `tailfuse test`: `[[test]]`.",
            "type": "array",
            "items": {"$ref": "#/$defs/test"},
        }),
    );
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tailfuse pipeline",
        "description": "A pipeline file of tailfuse.",
        "type": "object",
        "properties": properties,
        "required": ["name", "stages"],
        "additionalProperties": false,
        "$defs": definitions,
    })
}

fn params_schema() -> Value {
    json!({
        "description": "Values for `{{ name }}` in the strings of the file; `--param name=value` replaces a default.",
        "type": "object",
        "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
        "additionalProperties": {
            "oneOf": [
                {"type": "string"},
                {"type": "number"},
                {"type": "boolean"},
                {
                    "type": "object",
                    "properties": {"required": {"const": true}},
                    "required": ["required"],
                    "additionalProperties": false,
                },
            ],
        },
    })
}

/// Moves a schema's own `$defs` into the document's, under a prefix, so that equal names of two
/// kinds do not meet.
fn hoist(schema: &mut Value, prefix: &str, definitions: &mut Map<String, Value>) {
    point_to(schema, prefix);
    if let Some(Value::Object(own)) = schema.as_object_mut().and_then(|m| m.shift_remove("$defs")) {
        definitions.extend(own.into_iter().map(|(name, def)| (format!("{prefix}{name}"), def)));
    }
}

fn point_to(value: &mut Value, prefix: &str) {
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                match value.as_str().filter(|_| key == "$ref").and_then(|r| r.strip_prefix("#/$defs/")) {
                    Some(name) => *value = format!("#/$defs/{prefix}{name}").into(),
                    None => point_to(value, prefix),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|i| point_to(i, prefix)),
        _ => {}
    }
}

/// Without the keywords that only a document's root has.
fn bare(mut schema: Value) -> Value {
    if let Some(map) = schema.as_object_mut() {
        map.shift_remove("$schema");
    }
    schema
}
