//! The whole mixture on small data: nothing held out in it, no repeats, the same bytes for the same seed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow::array::{AsArray, Float32Array, Int64Array, StringArray};
use proptest::prelude::*;
use serde_json::json;

use super::super::context::{Cancel, Observer, OutputTable};
use super::super::split::split_table;
use super::*;
use crate::columns::{AUGMENTED, INSTRUCTIONS as COUNT, PROMPT, RESPONSE, SPLIT, SYSTEM, TASK, TOKENS};
use crate::interactions::clean::tests::log;
use crate::interactions::split::{HistoryAtTest, Method, SplitRule};
use crate::tables::Table;

struct Silent;
impl Observer for Silent {
    fn begin(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn note(&self, _: &str) {}
}

fn config(more: Value) -> InstructConfig {
    let mut config = json!({ "train": "t", "items": "i", "model": "m" });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(config).unwrap()
}

/// Words as tokens.
fn words(messages: &[Message]) -> Result<usize> {
    Ok(messages.iter().map(|m| m.content.split_whitespace().count()).sum())
}

fn run(config: &InstructConfig, tables: &Tables, seed: u64) -> Result<StageResult> {
    config.check()?;
    let texts = Texts { system: TOPK_SYSTEM.into(), user: TOPK_USER.into(), own: BTreeMap::new() };
    let world = World::new(tables, config)?;
    let maker = Maker::new(config, &world, texts.compile()?, (seed, config.max_tokens), &words)?;
    mix(&maker, &Silent, &Cancel::default())
}

fn memory(mut result: StageResult, name: &str) -> Table {
    match result.tables.remove(name) {
        Some(OutputTable::Memory(table)) => table,
        _ => panic!("{name} is no table in memory"),
    }
}

/// One row of `instructions`.
#[derive(Clone, Debug)]
struct Row {
    task: String,
    user: i64,
    prompt: String,
    response: String,
    split: String,
    augmented: bool,
}

impl Row {
    /// The titles of a field, `; ` between them; ratings are cut off.
    fn field(&self, name: &str) -> Vec<String> {
        let line = self.prompt.lines().find_map(|l| l.strip_prefix(&format!("{name}: ")));
        let title = |t: &str| t.split(':').next().unwrap().to_owned();
        line.map(|l| l.split("; ").map(title).collect()).unwrap_or_default()
    }

    fn history(&self) -> Vec<String> {
        match self.task.as_str() {
            "rating" => self.field("Rating History"),
            "side_info" => {
                let lines = self.prompt.lines().skip_while(|l| *l != "Examples:").skip(1);
                lines.take_while(|l| !l.starts_with("Candidate")).map(|l| l.split(':').next().unwrap().into()).collect()
            }
            _ => self.field("Interaction History"),
        }
    }

    fn similar(&self) -> Vec<String> {
        self.field(if self.task == "rating" {
            "Similar User Rating History"
        } else {
            "Similar User Interaction History"
        })
    }

    fn candidates(&self) -> Vec<String> {
        let lines = self.prompt.lines().skip_while(|l| !l.starts_with("Candidate Item")).collect::<Vec<_>>();
        match lines[0].strip_prefix("Candidate Item: ") {
            Some(one) => vec![one.to_owned()],
            None => lines[1..].iter().take_while(|l| !l.contains(':')).map(|l| (*l).to_owned()).collect(),
        }
    }

    /// The item that the answer is about: an interaction of the user.
    fn answer(&self) -> String {
        match self.task.as_str() {
            "rating" | "side_info" => self.candidates().remove(0),
            "ranking" if self.response.len() == 1 => {
                let line = self.candidates().into_iter().find(|l| l.starts_with(&format!("{}. ", self.response)));
                line.unwrap()[3..].to_owned()
            }
            _ => self.response.lines().next().unwrap().to_owned(),
        }
    }
}

fn rows(result: StageResult) -> Vec<Row> {
    let table = memory(result, "instructions");
    let text = |name: &str| -> Vec<String> { table.strings(name).unwrap().into_iter().flatten().collect() };
    let (task, prompt, response, split) = (text(TASK), text(PROMPT), text(RESPONSE), text(SPLIT));
    let augmented = table.column(AUGMENTED).unwrap();
    let augmented = augmented.as_boolean();
    (0..table.num_rows())
        .map(|r| Row {
            task: task[r].clone(),
            user: table.i64s(USER_ID).unwrap()[r],
            prompt: prompt[r].clone(),
            response: response[r].clone(),
            split: split[r].clone(),
            augmented: augmented.value(r),
        })
        .collect()
}

fn item_table(n: usize) -> Table {
    Table::from_columns(vec![
        (ITEM_ID, Arc::new(Int64Array::from_iter_values(0..n as i64)), false),
        (TITLE, Arc::new(StringArray::from_iter_values((0..n).map(|i| format!("Title {i}")))), true),
        ("genres", Arc::new(StringArray::from_iter((0..n).map(|i| (i % 7 > 0).then(|| format!("G{}", i % 3))))), true),
    ])
    .unwrap()
}

fn ints(columns: &[(&str, &[i64])]) -> Table {
    let column = |v: &[i64]| Arc::new(Int64Array::from(v.to_vec())) as arrow::array::ArrayRef;
    Table::from_columns(columns.iter().map(|(name, v)| (*name, column(v), false)).collect()).unwrap()
}

/// Train of a leave-one-out split, all inputs around it, and titles of each user by part.
struct Split {
    tables: Tables,
    parts: BTreeMap<&'static str, BTreeMap<i64, BTreeSet<String>>>,
}

fn split_of(rows: &[(i64, i64, f32, i64)], n_items: usize) -> Split {
    let rule = SplitRule { method: Method::LeaveOneOut, min_interactions: 3, history_at_test: HistoryAtTest::Train };
    let mut parts = BTreeMap::new();
    let mut train = None;
    for name in ["train", "valid", "test"] {
        let part = memory(split_table(&log(rows), &rule, 0).unwrap(), name);
        let mut of = BTreeMap::<i64, BTreeSet<String>>::new();
        for (user, item) in part.i64s(USER_ID).unwrap().into_iter().zip(part.i64s(ITEM_ID).unwrap()) {
            of.entry(user).or_default().insert(format!("Title {item}"));
        }
        parts.insert(name, of);
        train = train.or(Some(part));
    }
    let train = train.unwrap();
    let users: BTreeSet<i64> = train.i64s(USER_ID).unwrap().into_iter().collect();
    let users: Vec<i64> = users.into_iter().collect();
    let next: Vec<i64> = users.iter().cycle().skip(1).take(users.len()).copied().collect();
    let predictions = Table::from_columns(vec![
        (USER_ID, train.column(USER_ID).unwrap(), false),
        (ITEM_ID, train.column(ITEM_ID).unwrap(), false),
        (PREDICTED_RATING, Arc::new(Float32Array::from(vec![3.25; train.num_rows()])), false),
    ]);
    let tables = Tables {
        items: item_table(n_items),
        neighbours: Some(ints(&[(USER_ID, &users), (NEIGHBOUR_ID, &next), (RANK, &vec![1; users.len()])])),
        predictions: Some(predictions.unwrap()),
        recommender: None,
        train,
    };
    Split { tables, parts }
}

/// Eight users with overlapping tastes, nine interactions each, and one with two.
fn small() -> Vec<(i64, i64, f32, i64)> {
    let many = (0..72).map(|r| (r % 8, (r / 8 * 5 + r % 8 * 10) % 60, (1 + r % 5) as f32, r));
    many.chain([(8, 3, 4., 100), (8, 9, 4., 101)]).collect()
}

const ALL: [&str; 5] = ["list", "pairwise", "ranking", "rating", "side_info"];

fn all_tasks() -> Value {
    json!({ "side_columns": ["genres"], "candidates": 6, "list_items": 4, "held_out_share": 0.3 })
}

/// What must hold of every instruction.
fn check_nothing_held_out(rows: &[Row], split: &Split) -> std::result::Result<(), TestCaseError> {
    let none = BTreeSet::new();
    for row in rows {
        let of = |part: &str, user: i64| split.parts[part].get(&user).unwrap_or(&none);
        let train = of("train", row.user);
        let shown: BTreeSet<String> = row.history().into_iter().chain([row.answer()]).collect();
        prop_assert!(shown.is_subset(train), "{row:?}");
        for part in ["valid", "test"] {
            prop_assert!(shown.is_disjoint(of(part, row.user)), "{part}: {row:?}");
        }
        prop_assert!(!row.history().is_empty() && !row.history().contains(&row.answer()), "{row:?}");
        let anyone = split.parts["train"].values().any(|t| row.similar().iter().all(|title| t.contains(title)));
        prop_assert!(anyone, "{row:?}");
    }
    Ok(())
}

#[test]
fn all_tasks_with_and_without_augmented_fields() {
    let split = split_of(&small(), 70);
    let result = run(&config(all_tasks()), &split.tables, 3).unwrap();
    assert_eq!(result.counters["users"], 9);
    assert_eq!(result.counters["users_too_few"], 1);
    let counts = memory(run(&config(all_tasks()), &split.tables, 3).unwrap(), "counts");
    let total: i64 = counts.i64s(COUNT).unwrap().iter().sum();
    let rows = rows(result);
    assert_eq!(total, rows.len() as i64);
    check_nothing_held_out(&rows, &split).unwrap();
    assert_eq!(rows.iter().map(|r| r.task.as_str()).collect::<BTreeSet<_>>(), BTreeSet::from(ALL));
    for row in &rows {
        assert_ne!(row.user, 8);
        assert_eq!(row.augmented, row.prompt.contains("Similar User") || row.prompt.contains("Conventional Model"));
        assert!(!row.augmented || ["ranking", "rating"].contains(&row.task.as_str()));
        if let Some(n) = BTreeMap::from([("pairwise", 2), ("list", 4), ("ranking", 6)]).get(row.task.as_str()) {
            let candidates = row.candidates();
            assert_eq!(candidates.iter().collect::<BTreeSet<_>>().len(), *n, "{row:?}");
            let seen = split.parts["train"][&row.user].clone();
            let chosen = candidates.iter().filter(|c| seen.contains(c.rsplit(". ").next().unwrap())).count();
            assert_eq!(chosen, 1, "only the answer is seen in train: {row:?}");
        }
    }
    for task in ["ranking", "rating"] {
        let of = rows.iter().filter(|r| r.task == task);
        assert_eq!(of.map(|r| r.augmented).collect::<BTreeSet<_>>().len(), 2, "{task}");
    }
    // A user is in one part only.
    let splits: BTreeSet<(i64, &str)> = rows.iter().map(|r| (r.user, r.split.as_str())).collect();
    assert_eq!(splits.len(), rows.iter().map(|r| r.user).collect::<BTreeSet<_>>().len());
    assert_eq!(splits.iter().map(|s| s.1).collect::<BTreeSet<_>>(), BTreeSet::from(["train", "held-out"]));
}

/// Items that occur in held-out interactions only can be candidates, since they could be anyone's, and nothing else.
#[test]
fn a_planted_held_out_title_is_never_history_or_answer() {
    let mut log = small();
    // Item 65 is user 0's last interaction and in nobody's train.
    log.push((0, 65, 5.0, 200));
    let split = split_of(&log, 66);
    assert!(split.parts["test"][&0].contains("Title 65"));
    let mut candidate = false;
    for seed in 0..8 {
        let rows = rows(run(&config(all_tasks()), &split.tables, seed).unwrap());
        check_nothing_held_out(&rows, &split).unwrap();
        for row in &rows {
            let planted = |titles: Vec<String>| titles.iter().any(|t| t.ends_with("Title 65"));
            assert!(!planted(row.history()) && !planted(row.similar()) && !row.answer().ends_with("Title 65"));
            candidate |= row.user == 0 && planted(row.candidates());
        }
    }
    assert!(candidate, "if it could not occur, its absence would give it away");
}

#[test]
fn titles_in_full_put_the_next_item_first() {
    let split = split_of(&small(), 70);
    let more = json!({ "tasks": ["ranking"], "candidates": 5, "candidate_style": "titles" });
    for row in rows(run(&config(more), &split.tables, 1).unwrap()) {
        let answer: Vec<String> = row.response.lines().map(str::to_owned).collect();
        let shown: BTreeSet<String> = row.candidates().into_iter().collect();
        assert_eq!(answer.iter().cloned().collect::<BTreeSet<_>>(), shown);
        assert_eq!((answer.len(), &row.answer()), (5, &answer[0]));
    }
}

#[test]
fn repeats_are_dropped_and_the_size_is_a_limit() {
    // Each user has rated item 0 and then items of one title: the same instruction over and over.
    let rows_of: Vec<(i64, i64, f32, i64)> = (0..30).map(|r| (r / 3, r % 3, 3.0, r)).collect();
    let mut split = split_of(&rows_of, 3);
    split.tables.train = {
        let ids = |f: &dyn Fn(i64) -> i64| (0..30).map(f).collect::<Vec<i64>>();
        ints(&[
            (USER_ID, &ids(&|r| r / 3)),
            (ITEM_ID, &ids(&|r| r % 3)),
            (POSITION, &ids(&|r| r % 3)),
            (RATING, &[3; 30]),
        ])
    };
    split.tables.predictions = None;
    split.tables.neighbours = None;
    let result = run(&config(json!({ "tasks": ["rating"] })), &split.tables, 1).unwrap();
    // Ten users with the same history: two instructions.
    assert_eq!((&result.counters["instructions"], &result.counters["duplicates_dropped"]), (&json!(2), &json!(18)));
    let split = split_of(&small(), 70);
    let result = run(&config(json!({ "tasks": ["list", "pairwise"], "per_task": 7 })), &split.tables, 1).unwrap();
    assert_eq!(result.counters["instructions"], 14);
}

#[test]
fn conversations_stay_within_the_budget() {
    let split = split_of(&small(), 70);
    let budget = 75;
    let tight = config(json!({ "tasks": ["ranking", "rating"], "candidates": 4, "max_tokens": budget }));
    let result = run(&tight, &split.tables, 1).unwrap();
    assert!(result.counters["trimmed"].as_u64().unwrap() > 0);
    let table = memory(result, "instructions");
    assert!(table.num_rows() > 0);
    let text = |name: &str| -> Vec<String> { table.strings(name).unwrap().into_iter().flatten().collect() };
    let (system, prompt, response) = (text(SYSTEM), text(PROMPT), text(RESPONSE));
    for (row, &tokens) in table.i32s(TOKENS).unwrap().iter().enumerate() {
        let messages = [&system[row], &prompt[row], &response[row]].map(|t| Message::new("user", t.as_str()));
        assert_eq!(words(&messages).unwrap(), tokens as usize);
        assert!(tokens <= budget);
    }
    let result = run(&config(json!({ "tasks": ["pairwise"], "max_tokens": 9 })), &split.tables, 1).unwrap();
    assert_eq!(result.counters["instructions"], 0);
    assert!(result.counters["too_long"].as_u64().unwrap() > 0);
}

#[test]
fn another_number_of_threads_gives_the_same_bytes() {
    let split = split_of(&small(), 70);
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            memory(run(&config(all_tasks()), &split.tables, 5).unwrap(), "instructions").to_batch().unwrap()
        })
    };
    assert_eq!(on(1), on(3));
}

#[test]
fn wrong_configs_are_refused() {
    for (more, words) in [
        (json!({ "tasks": ["side_info"] }), "needs `side_columns`"),
        (json!({ "tasks": [] }), "`tasks` is empty"),
        (json!({ "candidates": 27 }), "27"),
        (json!({ "held_out_share": 1.5 }), "between 0 and 1"),
        (json!({ "templates": { "ranking": "x" } }), "`templates.ranking`"),
        (json!({ "per_task": 0 }), "at least 1"),
    ] {
        let error = config(more).check().unwrap_err();
        assert!(error.fault.exit_code() == 78 && error.message.contains(words), "{error}");
    }
    let split = split_of(&small(), 70);
    let error = run(&config(json!({ "side_columns": ["director"] })), &split.tables, 0).err().unwrap();
    assert!(error.fault.exit_code() == 65 && error.message.contains("`director`"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Over random logs and seeds: nothing held out is shown, and what is held out changes nothing.
    #[test]
    fn held_out_interactions_have_no_say(
        seed in any::<u64>(),
        picks in prop::collection::vec((0i64..6, 0i64..40, 1u8..=5), 20..120),
        other in prop::collection::vec(0i64..40, 12),
    ) {
        let log: Vec<(i64, i64, f32, i64)> =
            picks.iter().enumerate().map(|(n, &(u, i, r))| (u, i, f32::from(r), n as i64)).collect();
        // Each user's last two interactions, in two versions, with items that are in nobody's train.
        let with = |items: &dyn Fn(usize) -> i64| -> Split {
            let mut log = log.clone();
            log.extend((0..12).map(|n| (n as i64 % 6, items(n), 3.0, 1000 + n as i64)));
            split_of(&log, 100)
        };
        let a = with(&|n| 40 + n as i64);
        let b = with(&|n| 52 + other[n] + n as i64 % 2);
        let wanted = config(all_tasks());
        let (first, second) = (run(&wanted, &a.tables, seed).unwrap(), run(&wanted, &b.tables, seed).unwrap());
        if a.tables.train.to_batch().unwrap() == b.tables.train.to_batch().unwrap() {
            prop_assert_eq!(
                memory(run(&wanted, &a.tables, seed).unwrap(), "instructions").to_batch().unwrap(),
                memory(run(&wanted, &b.tables, seed).unwrap(), "instructions").to_batch().unwrap()
            );
        }
        check_nothing_held_out(&rows(first), &a)?;
        check_nothing_held_out(&rows(second), &b)?;
    }
}
