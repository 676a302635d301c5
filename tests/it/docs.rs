//! Generated documents and the committed ones are the same.

use serde_json::Value;
use tailfuse::pipeline::json_schema::json_schema_of;
use tailfuse::pipeline::reference_docs::{EXAMPLE, pipeline_markdown_of, resolve_sample};
use tailfuse::pipeline::{LoadOptions, json_schema, load_text, pipeline_markdown};
use tailfuse::stages::KINDS;

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

/// Samples are right configs of their kinds, and kinds are told apart by their names.
#[test]
fn every_kind_has_a_sample_that_resolves() {
    for kind in KINDS.iter().chain(FAKES) {
        let stage = resolve_sample(kind).unwrap_or_else(|e| panic!("{e}"));
        assert!(!stage.inputs().is_empty(), "`{}` reads nothing", kind.name);
        assert!(!kind.about.is_empty() && kind.version > 0);
        let slots: Vec<String> = stage.outputs().iter().map(|o| o.name.to_owned()).collect();
        assert!(slots.iter().enumerate().all(|(i, o)| !slots[..i].contains(o)), "`{}`: {slots:?}", kind.name);
    }
    for (i, kind) in KINDS.iter().enumerate() {
        assert!(KINDS[..i].iter().all(|k| k.name != kind.name), "`{}` is there twice", kind.name);
        let file = format!("src/stages/{}.rs", kind.name);
        assert!(std::path::Path::new(&file).exists(), "{file} holds kind `{}`", kind.name);
    }
}

/// The example at the head of the docs is a right pipeline of the real kinds.
#[test]
fn the_example_of_the_docs_loads() {
    let pipeline = load_text(EXAMPLE.to_owned(), "example.toml".as_ref(), &LoadOptions::default()).unwrap();
    let order: Vec<&str> = pipeline.stages.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(order, ["parts", "lightgcn", "shortlist", "with_titles", "publish"]);
}

fn shipped_pipelines() -> Vec<std::path::PathBuf> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines");
    let mut files = Vec::new();
    for folder in [folder.clone(), folder.join("experiments")] {
        let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
        files.extend(entries.filter(|p| p.extension().is_some_and(|e| e == "toml")));
    }
    files
}

#[test]
fn the_pipelines_that_ship_load() {
    let files = shipped_pipelines();
    assert!(files.len() >= 6);
    for file in files {
        let loaded = tailfuse::pipeline::load(&file, &[], &[]);
        loaded.unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    }
}

/// The figures of docs/experiments.md come from these files, so that each backbone has a stage of its name in one of
/// them, at its defaults; others of other names may set something.
#[test]
fn every_backbone_is_in_an_experiment() {
    let text: String = shipped_pipelines()
        .iter()
        .filter(|p| p.parent().unwrap().ends_with("experiments"))
        .map(|p| std::fs::read_to_string(p).unwrap())
        .collect();
    for backbone in tailfuse::recommenders::BACKBONES {
        let name = backbone.name;
        let stage = format!("\n[stages.{name}]\nkind = \"search\"\nmodel = \"{name}\"\ntrain = ");
        assert_eq!(text.matches(&stage).count(), 1, "`{name}` in pipelines/experiments");
    }
}

#[test]
fn the_docs_have_every_hyper_parameter_with_its_default() {
    let text = pipeline_markdown();
    for backbone in tailfuse::recommenders::BACKBONES {
        let (_, section) = text.split_once(&format!("\n### `{}`\n", backbone.name)).unwrap();
        let section = section.split("\n### ").next().unwrap();
        let hyper = backbone.hyper(&serde_json::json!({})).unwrap();
        for (name, default) in hyper.as_object().unwrap() {
            let line = section.lines().find(|l| l.starts_with(&format!("| `{name}` |")));
            let line = line.unwrap_or_else(|| panic!("`{}` has no line `{name}`", backbone.name));
            if default.is_number() {
                assert!(line.contains(&format!("| `{default}` |")), "{}: {line}", backbone.name);
            }
        }
    }
}
