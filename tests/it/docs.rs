//! Generated documents and the committed ones are the same.

use serde_json::Value;
use tailfuse::pipeline::json_schema::json_schema_of;
use tailfuse::pipeline::reference_docs::{EXAMPLE, pipeline_markdown_of};
use tailfuse::pipeline::{LoadOptions, json_schema, load_text, pipeline_markdown};

use crate::pipeline_file_fakes::FAKES;

#[test]
fn docs_are_current() {
    let committed = std::fs::read_to_string("docs/pipeline.md").unwrap_or_default();
    let generated = pipeline_markdown();
    if committed != generated {
        let line = 1 + committed.lines().zip(generated.lines()).take_while(|(a, b)| a == b).count();
        panic!(
            "docs/pipeline.md differs from what the code says, from line {line} on; mend it with\n  just docs\n\
             (which runs `tailfuse schema --markdown > docs/pipeline.md`)"
        );
    }
}

#[test]
fn the_docs_name_every_key_with_type_default_and_range() {
    let text = pipeline_markdown_of(FAKES);
    for line in [
        "| `seed` | integer, at least 0 | `42` | Seed of every random choice.",
        "| `min_interactions` | integer, 3 to 1000 | `3` | Users with fewer interactions are not evaluated. |",
        "| `input` | string | required | The log that is split. |",
        "| `strategy` | `\"leave-one-out\"` or `\"global-time\"` | `\"leave-one-out\"` | How it is split. `leave-one-out`: The last",
        "| `columns` | table: name = string |",
        "Keys of `hyper`:",
        "| `layers` | integer, 1 to 8 | `3` | Propagation layers. |",
        "| `model` | artifact | The weights. |",
        "| `input` | table | `user_id`, `item_id` |",
        "[stages.example.hyper]",
        "Splits a log \\| in parts.",
    ] {
        assert!(text.contains(line), "`{line}` is missing in\n{text}");
    }
}

/// Every `$ref` of the schema leads somewhere, and the schema knows each kind.
#[test]
fn the_schema_holds_together() {
    fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(map) => map.iter().for_each(|(k, v)| match v.as_str() {
                Some(reference) if k == "$ref" => found.push(reference),
                _ => references(v, found),
            }),
            Value::Array(items) => items.iter().for_each(|i| references(i, found)),
            _ => {}
        }
    }
    for schema in [json_schema_of(FAKES), json_schema()] {
        let mut found = Vec::new();
        references(&schema, &mut found);
        assert!(!found.is_empty());
        for reference in found {
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(schema.pointer(pointer).is_some(), "{reference} leads nowhere");
        }
    }
    let schema = json_schema_of(FAKES);
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    assert_eq!(schema["properties"]["stages"]["additionalProperties"]["oneOf"].as_array().unwrap().len(), FAKES.len());
    let train = &schema["$defs"]["stage.train"];
    assert_eq!(train["properties"]["kind"]["const"], "train");
    assert_eq!(train["required"][0], "kind");
    assert_eq!(train["additionalProperties"], false);
    assert_eq!(schema["$defs"]["train.Hyper"]["properties"]["layers"]["maximum"], 8);
}

/// The example at the head of the docs is a right pipeline of the real kinds.
#[test]
fn the_example_of_the_docs_loads() {
    let pipeline = load_text(EXAMPLE.to_owned(), "example.toml".as_ref(), &LoadOptions::default()).unwrap();
    let order: Vec<&str> = pipeline.stages.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(order, ["parts", "model", "popular"]);
}
