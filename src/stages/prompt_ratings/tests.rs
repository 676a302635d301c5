//! What the stage `prompt_ratings` writes, for tables of a few rows.

use arrow::array::{AsArray, Float64Array, Int64Array};
use serde_json::json;

use super::*;
use crate::stages::context::OutputTable;

struct Silent;
impl Observer for Silent {
    fn begin(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn note(&self, _: &str) {}
}

fn config(more: Value) -> PromptRatingsConfig {
    let mut config = json!({ "pairs": "p", "history": "h", "items": "i", "model": "m", "noun": "films" });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(config).unwrap()
}

/// A table of int64 columns.
fn ints(columns: &[(&str, &[i64])]) -> Table {
    let column = |v: &[i64]| Arc::new(Int64Array::from(v.to_vec())) as ArrayRef;
    Table::from_columns(columns.iter().map(|(name, v)| (*name, column(v), false)).collect()).unwrap()
}

fn tables() -> Tables {
    let log: [(i64, i64, i64, f64); 6] =
        [(1, 12, 2, 4.0), (1, 10, 1, 3.5), (1, 11, 3, 1.0), (2, 10, 1, 5.0), (2, 14, 2, 2.0), (3, 13, 1, 2.0)];
    let column =
        |f: fn(&(i64, i64, i64, f64)) -> i64| -> ArrayRef { Arc::new(Int64Array::from_iter_values(log.iter().map(f))) };
    let history = Table::from_columns(vec![
        (USER_ID, column(|r| r.0), false),
        (ITEM_ID, column(|r| r.1), false),
        (POSITION, column(|r| r.2), false),
        (RATING, Arc::new(Float64Array::from_iter_values(log.iter().map(|r| r.3))), false),
    ]);
    let items = Table::from_columns(vec![
        (ITEM_ID, Arc::new(Int64Array::from(vec![10, 11, 12, 13, 14])) as ArrayRef, false),
        (TITLE, Arc::new(StringArray::from(vec![Some("Ten"), Some("Eleven"), Some("Twelve"), None, Some("1")])), true),
    ]);
    Tables {
        // 1 is asked about two items and one without a title; 3 has no title in the history; 4 is not known.
        pairs: ints(&[(USER_ID, &[4, 1, 1, 1, 1, 3]), (ITEM_ID, &[10, 14, 13, 10, 14, 10])]),
        history: history.unwrap(),
        items: items.unwrap(),
        neighbours: Some(ints(&[(USER_ID, &[1, 1]), (NEIGHBOUR_ID, &[2, 3]), (RANK, &[2, 1])])),
        predictions: Some(
            Table::from_columns(vec![
                (USER_ID, Arc::new(Int64Array::from(vec![1])) as ArrayRef, false),
                (ITEM_ID, Arc::new(Int64Array::from(vec![14])), false),
                (PREDICTED_RATING, Arc::new(Float64Array::from(vec![3.456])), false),
            ])
            .unwrap(),
        ),
    }
}

/// Words as tokens.
fn words(messages: &[Message]) -> Result<usize> {
    Ok(messages.iter().map(|m| m.content.split_whitespace().count()).sum())
}

fn run(config: &PromptRatingsConfig, tables: &Tables) -> Result<StageResult> {
    let cases = Cases::new(tables, config.max_title_chars)?;
    Writer::new(config, &BTreeMap::new(), 4096, &cases, &words)?.write_all(&Silent, &Cancel::default())
}

fn memory(result: &mut StageResult, name: &str) -> Table {
    match result.tables.remove(name) {
        Some(OutputTable::Memory(table)) => table,
        _ => panic!("{name} is no table in memory"),
    }
}

#[test]
fn a_pair_is_a_prompt_with_rated_histories() {
    let mut result = run(&config(json!({})), &tables()).unwrap();
    let prompts = memory(&mut result, "prompts");
    let text: Vec<String> = prompts.strings(PROMPT).unwrap().into_iter().flatten().collect();
    assert_eq!(text.len(), 2);
    insta::assert_snapshot!(text[1], @r"
    Instruction: The history lists films with the ratings that a user gave, from 1 to 5, the latest last. Which rating does the user give the candidate? Answer with the number only.
    Rating History: Ten: 3.5; Twelve: 4; Eleven: 1
    Candidate Item: 1
    Similar User Rating History: Ten: 5; 1: 2
    Conventional Model Prediction: 3.46
    Output:
    ");
    assert!(text[0].contains("Candidate Item: Ten\n") && !text[0].contains("Conventional"), "{}", text[0]);
    assert_eq!(prompts.i32s(PERMUTATION).unwrap(), [0, 1]);
    let batch = prompts.to_batch().unwrap();
    let items = batch.column_by_name(CANDIDATES).unwrap().as_list::<i32>().clone();
    assert_eq!(items.values().as_primitive::<arrow::datatypes::Int64Type>().values(), &[10, 14]);
    let history = prompts.strings(HISTORY_DIGEST).unwrap();
    assert_eq!(history[0], history[1]);

    let skipped = memory(&mut result, "skipped");
    let reasons: Vec<String> = skipped.strings(REASON).unwrap().into_iter().flatten().collect();
    assert_eq!(skipped.i64s(USER_ID).unwrap(), [1, 3, 4]);
    assert_eq!(reasons, ["no_title", "no_title", "cold_user"]);
    for (counter, value) in
        [("pairs", 5), ("prompts", 2), ("users", 3), ("repeats_dropped", 1), ("skipped_no_title", 2)]
    {
        assert_eq!(result.counters[counter], value, "{counter}");
    }
}

#[test]
fn what_is_asked_is_what_is_tuned() {
    let mut result = run(&config(json!({ "similar_items": 0 })), &Tables { predictions: None, ..tables() }).unwrap();
    let text = memory(&mut result, "prompts").strings(PROMPT).unwrap();
    let history: Vec<Line<'_>> = [("Ten", "3.5"), ("Twelve", "4"), ("Eleven", "1")]
        .map(|(title, value)| Line { title, value: value.to_owned() })
        .into();
    let fields = InstructionFields {
        noun: "films",
        history: &history,
        candidates: &["Ten"],
        range: ("1", "5"),
        ..InstructionFields::default()
    };
    let tuned = InstructionTemplates::new(&BTreeMap::new()).unwrap().user(InstructionTask::Rating, &fields).unwrap();
    assert_eq!(text[0].as_deref(), Some(tuned.as_str()));
}

#[test]
fn budgets_take_the_oldest_first_and_refuse_what_cannot_fit() {
    let whole = run(&config(json!({})), &tables()).unwrap().counters["prompt_tokens_max"].as_u64().unwrap();
    let mut result = run(&config(json!({ "max_tokens": whole - 1 })), &tables()).unwrap();
    let text = memory(&mut result, "prompts").strings(PROMPT).unwrap();
    assert!(text[1].as_ref().unwrap().contains("Rating History: Twelve: 4; Eleven: 1\n"), "{text:?}");
    assert_eq!((&result.counters["prompts_trimmed"], &result.counters["titles_trimmed"]), (&json!(1), &json!(1)));
    let error = run(&config(json!({ "max_tokens": 5 })), &tables()).err().unwrap();
    assert!(error.fault.exit_code() == 78 && error.message.contains("user `1`"), "{error}");
}

#[test]
fn another_rating_is_another_history() {
    let digest = |tables: &Tables| {
        let mut result = run(&config(json!({})), tables).unwrap();
        memory(&mut result, "prompts").strings(HISTORY_DIGEST).unwrap()[0].clone().unwrap()
    };
    let base = digest(&tables());
    // The pairs that are asked, and what the recommender adds, are no part of it.
    assert_eq!(base, digest(&Tables { predictions: None, neighbours: None, ..tables() }));
    let mut other = tables();
    let mut batch = other.history.to_batch().unwrap();
    batch = batch.slice(1, 5);
    other.history = Table::new(batch.schema(), vec![batch]);
    assert_ne!(base, digest(&other));
}

#[test]
fn configs_are_checked_before_anything_runs() {
    let resolved = |more: Value| {
        let mut config = json!({ "pairs": "p", "history": "h", "items": "i", "model": "m" });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        resolve(config, &ResolveContext { root: std::path::Path::new("/nowhere"), history_at_test: "train+valid" })
    };
    assert!(resolved(json!({})).is_ok());
    for (more, word) in [
        (json!({ "history_items": 0 }), "history_items"),
        (json!({ "max_title_chars": 7 }), "max_title_chars"),
        (json!({ "template": "absent.jinja" }), "template"),
    ] {
        let error = resolved(more).err().unwrap();
        assert!(error.fault.exit_code() == 78 && error.message.contains(word), "{error}");
    }
}
