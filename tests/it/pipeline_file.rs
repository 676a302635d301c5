//! The pipeline file's language: what a right file means, and how each mistake is shown.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tailfuse::error::{Error, Fault};
use tailfuse::pipeline::spec::stage_seed;
use tailfuse::pipeline::{LoadOptions, Node, Pipeline, load_text, load_with};
use tailfuse::stages::What;

use crate::pipeline_file_fakes::FAKES;

type Pairs<'a> = &'a [(&'a str, &'a str)];

fn owned(pairs: Pairs<'_>) -> Vec<(String, String)> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn load(file: &str, params: Pairs<'_>, sets: Pairs<'_>) -> Result<Pipeline, Error> {
    let path = Path::new("tests/golden/pipelines").join(file);
    let (params, sets) = (owned(params), owned(sets));
    load_with(&path, &LoadOptions { params: &params, sets: &sets, kinds: FAKES, ..LoadOptions::default() })
}

/// The message of a broken file, which must be the pipeline file's fault.
fn broken(file: &str, params: Pairs<'_>, sets: Pairs<'_>) -> String {
    let error = load(file, params, sets).err().unwrap_or_else(|| panic!("{file} was accepted"));
    assert_eq!(error.fault, Fault::Spec);
    assert_eq!(error.fault.exit_code(), 78);
    error.to_string()
}

fn right() -> Pipeline {
    load("right.toml", &[], &[]).unwrap()
}

#[test]
fn a_right_file_becomes_a_graph_in_order() {
    let pipeline = right();
    assert_eq!(pipeline.name, "movies");
    assert_eq!(pipeline.seed, 42);
    assert_eq!(pipeline.history_at_test.as_str(), "train+valid");
    assert_eq!(pipeline.memory_limit, 2 << 30);
    assert_eq!((pipeline.artifacts.as_str(), pipeline.warehouse.as_str()), ("artifacts", "warehouse"));
    assert!(pipeline.root.is_absolute() && pipeline.root.ends_with("tests/golden/pipelines"));
    let order: Vec<&str> = pipeline.stages.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(order, ["clean", "parts", "lightgcn", "shortlist", "publish"]);
    let wires: Vec<String> = pipeline
        .stages
        .iter()
        .flat_map(|s| {
            s.inputs.iter().map(move |i| format!("{} {} <- {}.{}", s.name, i.slot.slot, i.from.name(), i.output))
        })
        .collect();
    assert_eq!(
        wires,
        [
            "clean inputs.bad <- log.bad_rows",
            "clean inputs.log <- log.rows",
            "parts input <- clean.rows",
            "lightgcn train <- parts.train",
            "lightgcn valid <- parts.valid",
            "shortlist model <- lightgcn.model",
            "shortlist seen <- parts.train",
            "publish input <- shortlist.shortlist",
        ]
    );
    let shortlist = pipeline.stage("shortlist").unwrap();
    assert_eq!(shortlist.inputs[0].slot.what, What::Artifact);
    assert_eq!(shortlist.inputs[0].from, Node::Stage("lightgcn".into()));
    assert_eq!(shortlist.kind.name, "recommend");
}

#[test]
fn templates_reach_sources_and_stages_and_numbers_stay_numbers() {
    let pipeline = load("right.toml", &[("ds", "2026-11-23"), ("k", "5")], &[]).unwrap();
    let log = pipeline.source("log").unwrap();
    assert_eq!(log.uri, "s3://warehouse/events/2026-11-23/");
    assert_eq!(log.filter.as_deref(), Some("ds <= '2026-11-23'"));
    assert_eq!(log.columns["user_id"], "uid");
    assert_eq!(pipeline.stage("shortlist").unwrap().stage.identity()["k"], 5);
    let query = pipeline.stage("clean").unwrap().stage.identity()["query"].clone();
    assert_eq!(query, "select * from log\nwhere ds <= '2026-11-23'\n");
    assert_eq!(pipeline.params["k"], 5);
}

#[test]
fn set_replaces_keys_of_stages_sources_and_the_top() {
    let sets = [
        ("lightgcn.hyper.layers", "2"),
        ("seed", "7"),
        ("log.max_bad_rows", "0.5"),
        ("publish.partition.ds", "2026"),
        ("device", "cpu"),
        ("parts.seed", "11"),
    ];
    let pipeline = load("right.toml", &[], &sets).unwrap();
    let hyper = pipeline.stage("lightgcn").unwrap().stage.identity()["hyper"].clone();
    assert_eq!((&hyper["layers"], &hyper["embedding_dim"]), (&2.into(), &64.into()));
    assert_eq!(pipeline.seed, 7);
    assert_eq!(pipeline.source("log").unwrap().max_bad_rows, 0.5);
    assert_eq!(
        pipeline.stage("publish").unwrap().stage.identity()["partition"]["ds"],
        "2026",
        "a string, since the key is one"
    );
    assert_eq!(pipeline.stage("parts").unwrap().seed, 11);
    assert_eq!(pipeline.stage("clean").unwrap().seed, stage_seed(7, "clean"));
}

/// Two stages may write one table where each writes its own partition.
#[test]
fn partitions_of_a_table_are_different_outputs() {
    let text = std::fs::read_to_string("tests/golden/pipelines/right.toml").unwrap();
    let again = |partition: &str| {
        let more = "[stages.again]\nkind = 'write'\ninput = 'clean'\ntable = 'recommendations'\n";
        let text = format!("{text}\n{more}{partition}");
        let options = LoadOptions { kinds: FAKES, ..LoadOptions::default() };
        load_text(text, Path::new("tests/golden/pipelines/x.toml"), &options)
    };
    assert!(again("partition = { ds = '2026-11-21' }\n").is_ok());
    assert!(again("partition = { ds = '{{ ds }}' }\n").err().unwrap().message.contains("duplicate output"));
}

#[test]
fn a_new_stage_changes_no_other_seed() {
    let text = std::fs::read_to_string("tests/golden/pipelines/right.toml").unwrap();
    let more = format!("{text}\n[stages.a_first_one]\nkind = \"sql\"\ninputs = {{ x = \"log\" }}\n");
    let options = LoadOptions { kinds: FAKES, ..LoadOptions::default() };
    let more = load_text(more, Path::new("tests/golden/pipelines/right.toml"), &options).unwrap();
    assert_eq!(more.stages.len(), 6);
    for stage in right().stages {
        assert_eq!(more.stage(&stage.name).unwrap().seed, stage.seed, "{}", stage.name);
        assert!(i64::try_from(stage.seed).is_ok());
    }
}

/// One snapshot per class of mistake: `tests/it/snapshots/it__pipeline_file__NAME.snap`.
#[test]
fn each_mistake_is_shown_at_its_place() {
    let cases = [
        "artifact_and_table",
        "bad_names",
        "bad_template",
        "bad_toml",
        "cycle",
        "duplicate_key",
        "duplicate_name",
        "duplicate_output",
        "empty",
        "key_in_wrong_table",
        "missing_key",
        "missing_output",
        "missing_parameter",
        "missing_reference",
        "no_stages",
        "out_of_range",
        "refused_value",
        "several",
        "two_cycles",
        "unclosed",
        "unknown_key",
        "unknown_key_no_near",
        "unknown_kind",
        "unknown_parameter",
        "wrong_root",
        "wrong_type",
    ];
    for case in cases {
        insta::assert_snapshot!(case, broken(&format!("{case}.toml"), &[], &[]));
    }
    // No broken file lies there untested.
    let mut files: Vec<String> = std::fs::read_dir("tests/golden/pipelines")
        .unwrap()
        .map(|f| f.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .filter(|f| f != "right")
        .collect();
    files.sort();
    assert_eq!(files, cases);
}

#[test]
fn mistakes_on_the_command_line_are_shown_there() {
    insta::assert_snapshot!(
        "set_mistakes",
        broken(
            "right.toml",
            &[("dss", "2026-11-22"), ("k", "ten")],
            &[
                ("lightgcm.hyper.layers", "2"),
                ("lightgcn.hyper.layer", "2"),
                ("lightgcn.kind.x", "1"),
                ("shortlist.k", "many"),
                ("params.ds", "x")
            ],
        )
    );
}

#[test]
fn a_file_that_cannot_be_read() {
    let error = load("nowhere.toml", &[], &[]).err().unwrap();
    assert_eq!(error.fault.exit_code(), 78);
    insta::assert_snapshot!("no_such_file", error.to_string());
    let folder = load_with(Path::new("tests"), &LoadOptions::default()).err().unwrap();
    assert!(folder.message.starts_with("cannot read the pipeline file `tests`"), "{folder}");
    let temporary = tempfile::tempdir().unwrap();
    let path: PathBuf = temporary.path().join("latin1.toml");
    std::fs::write(&path, b"name = 'x'\n# caf\xe9\n").unwrap();
    let error = load_with(&path, &LoadOptions::default()).err().unwrap();
    assert!(error.message.contains("is not UTF-8 text (line 2, byte 16)"), "{error}");
}

#[test]
fn carets_survive_windows_line_ends_and_a_byte_order_mark() {
    let text = std::fs::read_to_string("tests/golden/pipelines/unknown_key.toml").unwrap();
    let text = format!("\u{feff}{}", text.replace('\n', "\r\n"));
    let options = LoadOptions { kinds: FAKES, ..LoadOptions::default() };
    let error = load_text(text, Path::new("tests/golden/pipelines/x.toml"), &options).err().unwrap();
    assert!(error.message.contains("x.toml:32:1"), "{error}");
    assert!(error.message.contains("| layer = 3\n"), "{error}");
}

#[test]
fn colours_only_where_asked() {
    let path = Path::new("tests/golden/pipelines/unknown_key.toml");
    let options = LoadOptions { kinds: FAKES, colour: true, ..LoadOptions::default() };
    assert!(load_with(path, &options).err().unwrap().message.contains('\u{1b}'));
    assert!(!broken("unknown_key.toml", &[], &[]).contains('\u{1b}'));
}

/// A long chain of stages is no danger to the stack, and keeps its order.
#[test]
fn thousands_of_stages() {
    let mut text = String::from("name = 'long'\n[sources.s]\nuri = 'x.parquet'\n");
    for i in (0..3000).rev() {
        let from = if i == 0 { "s".to_owned() } else { format!("t{}", i - 1) };
        text.push_str(&format!("[stages.t{i}]\nkind = 'sql'\ninputs = {{ x = '{from}' }}\n"));
    }
    let options = LoadOptions { kinds: FAKES, ..LoadOptions::default() };
    let pipeline = load_text(text.clone(), Path::new("x.toml"), &options).unwrap();
    assert!(pipeline.stages.iter().enumerate().all(|(i, s)| s.name == format!("t{i}")));
    let cyclic = text.replacen("x = 's'", "x = 't2999'", 1);
    let error = load_text(cyclic, Path::new("x.toml"), &options).err().unwrap();
    assert!(error.message.contains("the stages form a cycle: t2999 -> t2998"), "found");
}

/// Pieces that break files in interesting ways.
const PIECES: &[&str] = &[
    "",
    "\"",
    "'",
    "\"\"\"",
    "[",
    "]",
    "{",
    "}",
    "=",
    ".",
    ",",
    "\n",
    "\r",
    "#",
    "{{",
    "}}",
    "{% for",
    "%}",
    "é",
    "\u{1F600}",
    "\0",
    "kind",
    "stages",
    "[stages.clean]",
    "[[stages.clean]]",
    "-1",
    "1e400",
    "99999999999999999999",
    "2026-11-22",
    "nan",
    "lightgcn",
    "{{ ds }}",
    "{{ x }}",
    "params",
    "= {}",
    "= []",
    "\\u12",
    "\u{feff}",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the file holds, the answer is a pipeline or an error of the file.
    #[test]
    fn no_text_makes_load_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0usize..40, prop::sample::select(PIECES)), 1..6),
        from in prop::sample::select(&["right.toml", "several.toml", "cycle.toml"][..]),
        set in prop::collection::vec(("[a-z.]{0,12}", "[ -~]{0,10}"), 0..3),
    ) {
        let text = std::fs::read_to_string(Path::new("tests/golden/pipelines").join(from)).unwrap();
        let mut letters: Vec<char> = text.chars().collect();
        for (at, length, piece) in edits {
            let start = at.index(letters.len() + 1);
            let end = (start + length).min(letters.len());
            letters.splice(start..end, piece.chars());
        }
        let mut sets = set;
        sets.push(("lightgcn.hyper.layers".to_owned(), "é'".to_owned()));
        let options = LoadOptions { sets: &sets, kinds: FAKES, ..LoadOptions::default() };
        let path = Path::new("tests/golden/pipelines/x.toml");
        if let Err(error) = load_text(letters.into_iter().collect(), path, &options) {
            prop_assert_eq!(error.fault, Fault::Spec);
            prop_assert!(!error.message.is_empty());
        }
    }

    /// Also not text that was never a pipeline.
    #[test]
    fn no_noise_makes_load_panic(text in "\\PC{0,80}") {
        let options = LoadOptions { kinds: FAKES, ..LoadOptions::default() };
        prop_assert!(load_text(text, Path::new("x.toml"), &options).is_err());
    }
}
