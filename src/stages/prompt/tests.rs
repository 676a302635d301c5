//! What the stage `prompt` writes, for tables of a few rows.

use std::collections::{BTreeMap, BTreeSet};

use arrow::array::{ArrayRef, AsArray, Int64Array, StringArray};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::*;
use crate::interactions::clean::tests::log;
use crate::interactions::split::{HistoryAtTest, Method, SplitRule};
use crate::stages::context::{Cancel, Observer, OutputTable};
use crate::stages::split::split_table;
use crate::tables::Table;

struct Silent;
impl Observer for Silent {
    fn begin(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn note(&self, _: &str) {}
}

fn resolved(config: Value) -> Result<Box<dyn Stage>> {
    resolve(config, &ResolveContext { root: Path::new("/nowhere"), history_at_test: "train+valid" })
}

fn config(more: Value) -> PromptConfig {
    let mut config = json!({ "shortlist": "s", "history": "h", "items": "i", "model": "m" });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(config).unwrap()
}

/// Words as tokens.
fn words(messages: &[Message]) -> Result<usize> {
    Ok(messages.iter().map(|m| m.content.split_whitespace().count()).sum())
}

fn run(config: &PromptConfig, tables: &Tables) -> Result<StageResult> {
    let templates = Templates::new(TOPK_SYSTEM, TOPK_USER)?;
    let writer = Writer::new(config, 3, templates, 4096, &words)?;
    write_all(&writer, &Cases::new(tables, config.max_title_chars)?, &Silent, &Cancel::default())
}

fn memory(mut result: StageResult, name: &str) -> Table {
    match result.tables.remove(name) {
        Some(OutputTable::Memory(table)) => table,
        _ => panic!("{name} is no table in memory"),
    }
}

/// A table of int64 columns.
fn ints(columns: &[(&str, &[i64])]) -> Table {
    let column = |v: &[i64]| Arc::new(Int64Array::from(v.to_vec())) as ArrayRef;
    Table::from_columns(columns.iter().map(|(name, v)| (*name, column(v), false)).collect()).unwrap()
}

fn item_table(rows: &[(i64, Option<&str>)]) -> Table {
    Table::from_columns(vec![
        (ITEM_ID, Arc::new(rows.iter().map(|r| r.0).collect::<Int64Array>()), false),
        (TITLE, Arc::new(rows.iter().map(|r| r.1).collect::<StringArray>()), true),
    ])
    .unwrap()
}

fn prompts_by_user(table: &Table) -> BTreeMap<i64, String> {
    let texts = table.strings(PROMPT).unwrap().into_iter().flatten();
    table.i64s(USER_ID).unwrap().into_iter().zip(texts).collect()
}

fn line<'a>(prompt: &'a str, field: &str) -> Vec<&'a str> {
    let found = prompt.lines().find_map(|l| l.strip_prefix(&format!("{field}: ")));
    found.map(|titles| titles.split("; ").collect()).unwrap_or_default()
}

/// Users 1 and 2 are ordinary, 3 is cold, 4 has one titled candidate, 5 no titled history.
fn tables() -> Tables {
    Tables {
        shortlist: ints(&[
            (USER_ID, &[2, 2, 2, 1, 1, 1, 3, 3, 4, 4, 5, 5]),
            (ITEM_ID, &[10, 99, 11, 12, 11, 13, 10, 11, 10, 99, 10, 11]),
            (REC_RANK, &[3, 1, 2, 1, 2, 3, 1, 2, 1, 2, 1, 2]),
        ]),
        history: ints(&[
            (USER_ID, &[1, 1, 2, 2, 2, 4, 5]),
            (ITEM_ID, &[20, 21, 20, 98, 22, 20, 97]),
            (POSITION, &[1, 0, 0, 1, 2, 0, 0]),
        ]),
        items: item_table(&[
            (10, Some("Ten")),
            (11, Some(" El\neven")),
            (12, Some("Twelve")),
            (13, Some("Thirteen")),
            (20, Some("Twenty")),
            (21, Some("Twenty-one")),
            (22, Some("Twenty-two")),
            (98, None),
            (97, Some(" \t")),
            (10, Some("Ten again")),
        ]),
        neighbours: Some(ints(&[(USER_ID, &[1, 1, 2]), (NEIGHBOUR_ID, &[2, 5, 1]), (RANK, &[2, 1, 1])])),
        neighbour_history: None,
        users: None,
    }
}

#[test]
fn titles_reasons_and_counts() {
    let result = run(&config(json!({ "order": "recommender" })), &tables()).unwrap();
    for (counter, value) in [
        ("users", 5),
        ("prompts", 2),
        ("skipped_no_title", 2),
        ("skipped_cold_user", 1),
        ("candidates_without_title", 2),
        ("history_without_title", 2),
        ("history_not_in_item_table", 0),
        ("item_table_repeats", 1),
        ("titles_trimmed", 0),
    ] {
        assert_eq!(result.counters[counter], value, "{counter}");
    }
    assert_eq!(result.tables.len(), 2);
    let prompts = memory(result, "prompts");
    let texts = prompts_by_user(&prompts);
    assert_eq!(texts.keys().copied().collect::<Vec<_>>(), [1, 2]);
    // User 1's nearest neighbour is 5, who has no titled history; so the next one is shown.
    insta::assert_snapshot!(texts[&1], @r#"
    Instruction: The history lists items that a user has chosen, the latest last. Which of the candidates is the user most likely to choose next? Answer with its letter only.
    Interaction History: Twenty-one; Twenty
    Candidate Items:
    A. Twelve
    B. El even
    C. Thirteen
    Similar User Interaction History: Twenty; Twenty-two
    Conventional Model Prediction: Twelve; El even; Thirteen
    Output:
    "#);
    let lists = prompts.column(CANDIDATES).unwrap();
    let second = lists.as_list::<i32>().value(1);
    assert_eq!(second.as_primitive::<arrow::datatypes::Int64Type>().values(), &[11, 10]);
    let titles = prompts.column(CANDIDATE_TITLES).unwrap();
    let second = titles.as_list::<i32>().value(1);
    assert_eq!(second.as_string::<i32>().iter().flatten().collect::<Vec<_>>(), ["El even", "Ten"]);
    assert_eq!(prompts.i32s(HISTORY_SHOWN).unwrap(), [2, 2]);
}

#[test]
fn the_history_has_a_digest_that_the_shortlist_is_no_part_of() {
    let digests = |config: &PromptConfig, tables: &Tables| {
        memory(run(config, tables).unwrap(), "prompts").strings(HISTORY_DIGEST).unwrap()
    };
    let base = digests(&config(json!({})), &tables());
    assert_ne!(base[0], base[1]);
    let mut other = tables();
    other.shortlist = ints(&[(USER_ID, &[1, 1, 2, 2]), (ITEM_ID, &[13, 10, 12, 13]), (REC_RANK, &[1, 2, 1, 2])]);
    other.neighbours = None;
    assert_eq!(digests(&config(json!({})), &other), base);
    other.history = ints(&[(USER_ID, &[1, 2, 2, 2]), (ITEM_ID, &[21, 20, 98, 22]), (POSITION, &[0, 0, 1, 2])]);
    let shorter = digests(&config(json!({})), &other);
    assert!(shorter[0] != base[0] && shorter[1] == base[1]);
    for more in [json!({ "noun": "films" }), json!({ "history_items": 3 }), json!({ "candidate_style": "titles" })] {
        assert!(digests(&config(more.clone()), &tables()).iter().zip(&base).all(|(a, b)| a != b), "{more}");
    }
    // The recommender's places go along, in the order shown.
    let prompts = memory(run(&config(json!({ "order": "recommender" })), &tables()).unwrap(), "prompts");
    let places = prompts.column(CANDIDATE_PLACES).unwrap();
    let first = places.as_list::<i32>().value(0);
    assert_eq!(first.as_primitive::<arrow::datatypes::Int32Type>().values(), &[1, 2, 3]);
}

#[test]
fn skipped_users_have_a_reason() {
    let skipped = memory(run(&config(json!({})), &tables()).unwrap(), "skipped");
    assert_eq!(skipped.i64s(USER_ID).unwrap(), [3, 4, 5]);
    let reasons: Vec<String> = skipped.strings(REASON).unwrap().into_iter().flatten().collect();
    assert_eq!(reasons, ["cold_user", "no_title", "no_title"]);
}

#[test]
fn users_can_be_chosen_and_nobody_is_fine() {
    let chosen = Tables { users: Some(ints(&[(USER_ID, &[2, 77, 2])])), ..tables() };
    let result = run(&config(json!({})), &chosen).unwrap();
    assert_eq!(result.counters["users"], 1);
    assert_eq!(memory(result, "prompts").i64s(USER_ID).unwrap(), [2]);
    let nobody = Tables { users: Some(ints(&[(USER_ID, &[])])), ..tables() };
    let prompts = memory(run(&config(json!({})), &nobody).unwrap(), "prompts");
    assert_eq!((prompts.num_rows(), prompts.schema().fields().len()), (0, 12));
}

#[test]
fn permutations_come_in_order_with_one_digest_each() {
    let prompts = memory(run(&config(json!({ "permutations": 3 })), &tables()).unwrap(), "prompts");
    assert_eq!(prompts.i64s(USER_ID).unwrap(), [1, 1, 1, 2, 2, 2]);
    assert_eq!(prompts.i32s(PERMUTATION).unwrap(), [0, 1, 2, 0, 1, 2]);
    let text = |name: &str| -> Vec<String> { prompts.strings(name).unwrap().into_iter().flatten().collect() };
    let (system, user, digests) = (text(SYSTEM), text(PROMPT), text(PROMPT_DIGEST));
    for row in 0..6 {
        let json = serde_json::to_string(&[["system", &system[row]], ["user", &user[row]]]).unwrap();
        let digest = Sha256::digest(json.as_bytes());
        let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(digests[row], hex);
    }
    assert_eq!(system.iter().collect::<BTreeSet<_>>().len(), 1);
    // What comes before the history is the same for all users.
    let head = |text: &str| text.split("Interaction History").next().unwrap().to_owned();
    assert_eq!(user.iter().map(|t| head(t)).collect::<BTreeSet<_>>().len(), 1);
}

#[test]
fn nothing_held_out_is_shown_and_the_neighbour_is_not_filtered() {
    // Six users with overlapping tastes, nine interactions each.
    let rows: Vec<_> = (0..54).map(|r| (r % 6, (r / 6 * 5 + r % 6 * 10) % 60, 1., r)).collect();
    let rule = SplitRule { method: Method::LeaveOneOut, min_interactions: 3, history_at_test: HistoryAtTest::Train };
    let by_user = |name: &str| {
        let part = memory(split_table(&log(&rows), &rule, 0).unwrap(), name);
        let mut of = BTreeMap::<i64, Vec<String>>::new();
        for (user, item) in part.i64s(USER_ID).unwrap().into_iter().zip(part.i64s(ITEM_ID).unwrap()) {
            of.entry(user).or_default().push(format!("Title {item}"));
        }
        (part, of)
    };
    let ((train, known), (_, valid), (_, test)) = (by_user("history"), by_user("valid"), by_user("test"));
    let names: Vec<String> = (0..70).map(|i| format!("Title {i}")).collect();
    let items: Vec<_> = names.iter().enumerate().map(|(i, n)| (i as i64, Some(n.as_str()))).collect();
    let users: Vec<i64> = (0..6).flat_map(|u| [u; 3]).collect();
    let tables = Tables {
        shortlist: ints(&[(USER_ID, &users), (ITEM_ID, &[61, 62, 63].repeat(6)), (REC_RANK, &[1, 2, 3].repeat(6))]),
        history: train,
        items: item_table(&items),
        neighbours: Some(ints(&[(USER_ID, &[0, 1, 2, 3, 4, 5]), (NEIGHBOUR_ID, &[1, 2, 3, 4, 5, 0]), (RANK, &[1; 6])])),
        neighbour_history: None,
        users: None,
    };
    let texts = prompts_by_user(&memory(run(&config(json!({})), &tables).unwrap(), "prompts"));
    assert_eq!(texts.len(), 6);
    let mut held_out_of_target_shown_for_neighbour = 0;
    for (user, text) in &texts {
        let neighbour = (user + 1) % 6;
        assert_eq!(line(text, "Interaction History"), known[user]);
        assert_eq!(line(text, "Similar User Interaction History"), known[&neighbour]);
        for title in valid[user].iter().chain(&test[user]) {
            assert!(!line(text, "Interaction History").contains(&title.as_str()));
            held_out_of_target_shown_for_neighbour += usize::from(known[&neighbour].contains(title));
        }
        for title in valid[&neighbour].iter().chain(&test[&neighbour]) {
            assert!(!line(text, "Similar User Interaction History").contains(&title.as_str()));
        }
    }
    // Dropping such titles would tell the LLM what is held out.
    assert!(held_out_of_target_shown_for_neighbour > 0);
}

#[test]
fn another_number_of_threads_gives_the_same_table() {
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let prompts = memory(run(&config(json!({ "permutations": 4 })), &tables()).unwrap(), "prompts");
            prompts.to_batch().unwrap()
        })
    };
    assert_eq!(on(1), on(3));
}

#[test]
fn what_cannot_fit_is_refused_for_the_first_user() {
    let error = run(&config(json!({ "max_tokens": 5 })), &tables()).err().unwrap();
    assert_eq!(error.fault.exit_code(), 78);
    assert!(error.message.contains("user `1`"), "{error}");
}

#[test]
fn ids_of_two_types_are_named() {
    let ids = Arc::new(StringArray::from(vec!["10", "11"]));
    let titles = Arc::new(StringArray::from(vec!["a", "b"]));
    let items = Table::from_columns(vec![(ITEM_ID, ids, false), (TITLE, titles, true)]).unwrap();
    let error = run(&config(json!({})), &Tables { items, ..tables() }).err().unwrap();
    assert!(error.fault.exit_code() == 65 && error.message.contains("`item_id`"), "{error}");
}

#[test]
fn configs_are_checked_before_anything_runs() {
    let base = |key: &str, value: Value| {
        let mut config = json!({ "shortlist": "s", "history": "h", "items": "i", "model": "m" });
        config[key] = value;
        resolved(config)
    };
    for (key, value, words) in [
        ("history_items", json!(0), "`history_items` is 0"),
        ("permutations", json!(0), "`permutations` is 0"),
        ("neighbour_history", json!("x"), "`neighbours` only"),
        ("user_template", json!("absent.jinja"), "`user_template` cannot be read"),
        ("candidate_style", json!("numbers"), "numbers"),
    ] {
        let error = base(key, value).err().unwrap();
        assert!(error.fault.exit_code() == 78 && error.message.contains(words), "{error}");
    }
    let stage = base("neighbours", json!("similar")).unwrap();
    assert_eq!(stage.inputs().len(), 4);
    assert_eq!(stage.models(), ["m"]);
    let identity = stage.identity();
    assert_eq!(identity["user_template"], TOPK_USER);
    assert_eq!(identity["history_items"], 30);
}

#[test]
fn the_sample_parses() {
    let sample = serde_json::to_value(toml::from_str::<toml::Table>(KIND.sample).unwrap()).unwrap();
    assert_eq!(resolved(sample).unwrap().outputs().len(), 2);
}
