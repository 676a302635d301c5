//! Columns with figures -> which of them are users, items, times, ratings and titles, and why.
//!
//! In: a log and perhaps an item table that were looked at, and what the user said with `--map`. Out: a [`Guess`], each
//! part with its reason and whether it is sure. Names count most, then what the values look like, then whether the log's
//! values are found in the item table.

use std::collections::BTreeMap;

use super::columns::{Column, Looked, Shape};
use super::words;
use crate::columns::{ITEM_ID, RATING, ROW_ID, TIMESTAMP, TITLE, USER_ID};
use crate::error::{Error, Result};

/// Share of the log's items that the item table must know.
const KNOWN: f64 = 0.5;
/// Most distinct values that a column of ratings has.
const MOST_RATINGS: usize = 101;

/// One of our columns, found or not.
#[derive(Clone, Debug)]
pub struct Finding {
    /// `interactions` or `items`.
    pub table: &'static str,
    /// Our name.
    pub ours: &'static str,
    /// Theirs; `None` where there is none.
    pub theirs: Option<String>,
    /// Why, in words.
    pub why: String,
    /// Whether nothing speaks against it.
    pub sure: bool,
}

/// What the columns mean.
#[derive(Clone, Debug)]
pub struct Guess {
    /// Every column of ours, in the order of the tables.
    pub findings: Vec<Finding>,
    /// Other things that a person should know.
    pub notes: Vec<String>,
    /// Whether the ids of log and item table have different types.
    pub ids_differ: bool,
    /// A column of fractional seconds that becomes the timestamp in a `sql` stage.
    pub fractional_time: Option<String>,
}

impl Guess {
    /// Their column for one of ours.
    pub fn theirs(&self, table: &str, ours: &str) -> Option<&str> {
        self.findings.iter().find(|f| f.table == table && f.ours == ours)?.theirs.as_deref()
    }

    /// Our name -> their name of a table, with columns out of the way that have one of our names and mean something else.
    pub fn mapping(&self, table: &str, looked: &Looked) -> BTreeMap<String, String> {
        let mut map: BTreeMap<String, String> = BTreeMap::new();
        for finding in self.findings.iter().filter(|f| f.table == table) {
            let name = match (&finding.theirs, finding.ours) {
                (Some(theirs), TIMESTAMP) if self.fractional_time.as_ref() == Some(theirs) => FRACTIONAL,
                (_, ours) => ours,
            };
            if let Some(theirs) = finding.theirs.as_ref().filter(|t| *t != name) {
                map.insert(name.to_owned(), theirs.clone());
            }
        }
        let reserved: &[&str] = match table {
            LOG => &[USER_ID, ITEM_ID, RATING, TIMESTAMP, ROW_ID],
            _ => &[ITEM_ID, TITLE, ROW_ID],
        };
        for name in reserved.iter().filter(|n| looked.column(n).is_some()) {
            let taken = self.theirs(table, name) == Some(*name) && self.fractional_time.as_deref() != Some(*name);
            if !taken && !map.values().any(|t| t == name) {
                map.insert(format!("other_{name}"), (*name).to_owned());
            }
        }
        map
    }
}

/// What the reader calls a time with fractions, until a `sql` stage makes the timestamp of it.
pub const FRACTIONAL: &str = "seconds";
/// The log.
pub const LOG: &str = "interactions";
/// The item table.
pub const CATALOGUE: &str = "items";

/// Guesses. `given` is our name -> theirs, which settles it. Errors: a given column is not there (exit 2), or no column
/// can be the user or the item (exit 65, with what there is).
pub fn guess(log: &Looked, items: Option<&Looked>, given: &BTreeMap<String, String>) -> Result<Guess> {
    let mut found = Guess { findings: Vec::new(), notes: Vec::new(), ids_differ: false, fractional_time: None };
    let mut taken: Vec<String> = Vec::new();
    for (ours, theirs) in given {
        let table = if ours == TITLE { items } else { Some(log) };
        if ![USER_ID, ITEM_ID, RATING, TIMESTAMP, TITLE].contains(&ours.as_str()) {
            return Err(Error::usage(format!("`--map {ours}=...` names none of our columns"))
                .with_help("ours are user_id, item_id, rating, timestamp and title"));
        }
        let there = table.is_some_and(|t| t.column(theirs).is_some());
        let in_items = items.is_some_and(|t| t.column(theirs).is_some());
        if !(there || ours == ITEM_ID && in_items) {
            let names: Vec<&str> = table.iter().flat_map(|t| t.columns.iter().map(|c| c.name.as_str())).collect();
            return Err(Error::usage(format!("`--map {ours}={theirs}`: there is no column `{theirs}`"))
                .with_help(format!("the columns are: {}", names.join(", "))));
        }
        if ours != TITLE && there {
            taken.push(theirs.clone());
        }
    }
    let said = |ours: &str, looked: &Looked| given.get(ours).filter(|t| looked.column(t).is_some()).cloned();
    let by_you =
        |table, ours, theirs| Finding { table, ours, theirs: Some(theirs), why: "you said so".into(), sure: true };

    let time = match said(TIMESTAMP, log) {
        Some(theirs) => by_you(LOG, TIMESTAMP, theirs),
        None => time(log, &taken),
    };
    taken.extend(time.theirs.clone());
    if let Some(column) = time.theirs.as_deref().and_then(|t| log.column(t))
        && column.shape == Shape::Number
        && !column.whole
    {
        found.fractional_time = Some(column.name.clone());
    }
    let rating = match said(RATING, log) {
        Some(theirs) => by_you(LOG, RATING, theirs),
        None => rating(log, &taken),
    };
    taken.extend(rating.theirs.clone());

    let (item, in_catalogue) = match (said(ITEM_ID, log), items) {
        (Some(theirs), None) => (by_you(LOG, ITEM_ID, theirs), None),
        (None, None) => (item(log, &taken, given.get(USER_ID)), None),
        (given_item, Some(items)) => joined(log, items, &taken, given_item, said(ITEM_ID, items)),
    };
    taken.extend(item.theirs.clone());
    let user = match said(USER_ID, log) {
        Some(theirs) => by_you(LOG, USER_ID, theirs),
        None => user(log, &taken),
    };
    if user.theirs.is_none() || item.theirs.is_none() {
        let missing = if user.theirs.is_none() { USER_ID } else { ITEM_ID };
        let shown: Vec<String> = log
            .columns
            .iter()
            .map(|c| format!("{} ({}; e.g. {})", c.name, c.data_type, c.examples.join(", ")))
            .collect();
        return Err(Error::data(format!("no column of {} looks like `{missing}`", log.uri))
            .with_help(format!("say which it is: --map {missing}=COLUMN; the columns are: {}", shown.join("; "))));
    }
    let item_in_log = item.theirs.clone();
    found.findings.extend([user, item, time, rating]);
    if let Some(items) = items {
        let in_catalogue = in_catalogue.unwrap_or_else(|| nothing(CATALOGUE, ITEM_ID, "no column of it is an id"));
        let id = in_catalogue.theirs.clone();
        let title = match said(TITLE, items) {
            Some(theirs) => by_you(CATALOGUE, TITLE, theirs),
            None => title(items, id.as_deref()),
        };
        if let (Some(a), Some(b)) =
            (item_in_log.and_then(|n| log.column(&n)), id.as_deref().and_then(|n| items.column(n)))
        {
            found.ids_differ = (a.shape == Shape::Whole) != (b.shape == Shape::Whole);
        }
        if id.is_none() {
            return Err(Error::data(format!("no column of {} is the id of an item", items.uri)).with_help(
                "the id has another value in every row, and its values are in the log; say which it is: --map item_id=COLUMN",
            ));
        }
        found.findings.extend([in_catalogue, title]);
    }
    found.notes = notes(log, items, &found);
    Ok(found)
}

fn nothing(table: &'static str, ours: &'static str, why: &str) -> Finding {
    Finding { table, ours, theirs: None, why: why.to_owned(), sure: true }
}

/// Integers and short texts.
fn can_be_id(c: &Column) -> bool {
    matches!(c.shape, Shape::Whole | Shape::Text) && c.values > 0 && c.characters <= 64.0
}

fn best<'a>(columns: impl Iterator<Item = &'a Column>, score: impl Fn(&Column) -> f64) -> Option<(&'a Column, f64)> {
    let scored = columns.map(|c| (c, score(c)));
    // The first of equals: columns of ids come first in most logs.
    scored.fold(None, |best: Option<(&Column, f64)>, (c, s)| match best {
        Some((_, so_far)) if so_far >= s => best,
        _ if s > 0.0 => Some((c, s)),
        _ => best,
    })
}

/// The unit of whole numbers that look like times since 1970, with factor to seconds.
fn unit(c: &Column) -> Option<(&'static str, f64)> {
    let between = |factor: f64| c.least >= 1e8 * factor && c.most <= 4.2e9 * factor;
    [("seconds", 1.0), ("milliseconds", 1e3), ("microseconds", 1e6), ("nanoseconds", 1e9)]
        .into_iter()
        .find(|(_, factor)| between(*factor))
}

fn day(seconds: f64) -> String {
    chrono::DateTime::from_timestamp(seconds as i64, 0).map_or_else(String::new, |t| t.format("%Y-%m-%d").to_string())
}

fn time(log: &Looked, taken: &[String]) -> Finding {
    let score = |c: &Column| {
        let name = words::time(&c.name);
        let values = match c.shape {
            // Of a day and a time of day, the finer one.
            Shape::Time => 1.0 + (c.distinct.len() as f64 / c.values.max(1) as f64) * 0.5,
            Shape::Whole | Shape::Number if unit(c).is_some() => 0.8,
            Shape::Whole if name == 1.0 => 0.2,
            _ => return 0.0,
        };
        name + values
    };
    let Some((c, _)) = best(log.columns.iter().filter(|c| !taken.contains(&c.name)), score) else {
        return nothing(LOG, TIMESTAMP, "no column looks like a time; without one, each user's order is random");
    };
    let by_name = words::time(&c.name) > 0.0;
    let because = if by_name { "its name, and its values" } else { "its values" };
    let (why, sure) = match (c.shape, unit(c)) {
        (Shape::Time, _) => (format!("{because}: {} to {}", day(c.least / 1e6), day(c.most / 1e6)), true),
        (_, Some((unit, factor))) => {
            let fractions = if c.whole { "" } else { ", with fractions: made whole milliseconds in a `sql` stage" };
            let range = format!("{} to {}", day(c.least / factor), day(c.most / factor));
            (format!("{because}: {unit} since 1970, {range}{fractions}"), by_name)
        }
        _ => ("its name; the values are no times since 1970, and only their order is used".to_owned(), false),
    };
    Finding { table: LOG, ours: TIMESTAMP, theirs: Some(c.name.clone()), why, sure }
}

fn rating(log: &Looked, taken: &[String]) -> Finding {
    let numeric = |c: &&Column| matches!(c.shape, Shape::Whole | Shape::Number) && !taken.contains(&c.name);
    let few = |c: &Column| c.distinct.len() <= MOST_RATINGS;
    let named = |c: &Column| if few(c) { words::rating(&c.name) } else { 0.0 };
    let shown = |c: &Column| format!("{} values from {} to {}", c.distinct.len(), c.least, c.most);
    if let Some((c, _)) = best(log.columns.iter().filter(numeric), named) {
        let why = format!("its name, and its values: {}", shown(c));
        return Finding { table: LOG, ours: RATING, theirs: Some(c.name.clone()), why, sure: true };
    }
    // A file without a header: a column of few small values, between others of many.
    let small = |c: &Column| {
        let fits = !log.config.header && (2..=20).contains(&c.distinct.len()) && c.least >= 0.0 && c.most <= 10.0;
        f64::from(u8::from(fits && c.values >= 10 * c.distinct.len()))
    };
    match best(log.columns.iter().filter(numeric), small) {
        Some((c, _)) => Finding { table: LOG, ours: RATING, theirs: Some(c.name.clone()), why: shown(c), sure: false },
        None => nothing(LOG, RATING, "no column has the name of a rating; every row counts the same"),
    }
}

fn item(log: &Looked, taken: &[String], user: Option<&String>) -> Finding {
    let free = || log.columns.iter().filter(|c| can_be_id(c) && !taken.contains(&c.name) && user != Some(&c.name));
    if let Some((c, _)) = best(free(), |c| words::item(&c.name) * (1.1 - words::user(&c.name))) {
        let why = format!("its name; {} different values", c.distinct.len());
        return Finding { table: LOG, ours: ITEM_ID, theirs: Some(c.name.clone()), why, sure: true };
    }
    // By exclusion: what is no user, or the second of two.
    let no_user: Vec<&Column> = free().filter(|c| words::user(&c.name) == 0.0).collect();
    let user_is_named = free().any(|c| words::user(&c.name) > 0.0);
    let left = if user_is_named { no_user.first() } else { no_user.get(1) };
    match left {
        Some(c) => Finding {
            table: LOG,
            ours: ITEM_ID,
            theirs: Some(c.name.clone()),
            why: format!("the other column that can be an id; {} different values", c.distinct.len()),
            sure: false,
        },
        None => nothing(LOG, ITEM_ID, "no column is left that can be an id"),
    }
}

/// The pair of columns with the largest share of the log's values in the item table, names included.
fn joined(
    log: &Looked,
    items: &Looked,
    taken: &[String],
    given: Option<String>,
    given_in_items: Option<String>,
) -> (Finding, Option<Finding>) {
    let share = |a: &Column, b: &Column| {
        let known = a.distinct.iter().filter(|v| b.distinct.contains(*v)).count();
        known as f64 / a.distinct.len().max(1) as f64
    };
    let mut pairs = Vec::new();
    for a in log.columns.iter().filter(|c| match &given {
        Some(given) => *given == c.name,
        None => can_be_id(c) && !taken.contains(&c.name),
    }) {
        for b in items.columns.iter().filter(|c| given_in_items.as_ref().is_none_or(|g| *g == c.name)) {
            // An id has another value in (nearly) every row.
            let unique = b.values > 0 && b.distinct.len() as f64 >= 0.95 * b.values as f64;
            if !can_be_id(b) || !(unique || given_in_items.is_some()) {
                continue;
            }
            let names = words::item(&a.name) * (1.1 - words::user(&a.name))
                + words::item(&b.name)
                + f64::from(u8::from(a.name == b.name || words::is_plain_id(&b.name))) * 0.5
                - words::user(&a.name);
            let known = share(a, b);
            pairs.push((a, b, known, known + 0.5 * names));
        }
    }
    let first = pairs.into_iter().fold(None, |best: Option<(&Column, &Column, f64, f64)>, pair| match best {
        Some(so_far) if so_far.3 >= pair.3 => Some(so_far),
        _ => Some(pair),
    });
    let Some((a, b, known, _)) = first else {
        return (item(log, taken, None), None);
    };
    let sure = known >= KNOWN;
    let percent = known * 100.0;
    let of_log = match (sure, words::item(&a.name) > 0.0) {
        (true, true) => format!("its name, and {percent:.0}% of its values are in `{}` of the item table", b.name),
        (true, false) => format!("{percent:.0}% of its values are in `{}` of the item table", b.name),
        (false, _) => format!("its name; but only {percent:.0}% of its values are in `{}` of the item table", b.name),
    };
    let of_items = format!("another value in every row, {percent:.0}% of the log's `{}` among them", a.name);
    let finding = |table, name: &str, why| Finding { table, ours: ITEM_ID, theirs: Some(name.to_owned()), why, sure };
    (finding(LOG, &a.name, of_log), Some(finding(CATALOGUE, &b.name, of_items)))
}

fn user(log: &Looked, taken: &[String]) -> Finding {
    let free = || log.columns.iter().filter(|c| can_be_id(c) && !taken.contains(&c.name));
    let per = |c: &Column| c.values as f64 / c.distinct.len().max(1) as f64;
    if let Some((c, _)) = best(free(), |c| words::user(&c.name)) {
        let why = format!("its name; {} different values, {:.1} rows each", c.distinct.len(), per(c));
        return Finding { table: LOG, ours: USER_ID, theirs: Some(c.name.clone()), why, sure: per(c) > 1.0 };
    }
    match best(free(), |c| if c.distinct.len() > 1 && per(c) > 1.5 { c.distinct.len() as f64 } else { 0.0 }) {
        Some((c, _)) => Finding {
            table: LOG,
            ours: USER_ID,
            theirs: Some(c.name.clone()),
            why: format!("a column of ids that repeat: {} different values, {:.1} rows each", c.distinct.len(), per(c)),
            sure: false,
        },
        None => nothing(LOG, USER_ID, "no column is left that can be an id"),
    }
}

fn title(items: &Looked, id: Option<&str>) -> Finding {
    let texts = || items.columns.iter().filter(|c| c.shape == Shape::Text && Some(c.name.as_str()) != id);
    let missing = |c: &Column| match c.nulls {
        0 => String::new(),
        n => format!("; {n} of {} rows have none", n + c.values),
    };
    if let Some((c, _)) = best(texts(), |c| words::title(&c.name)) {
        let why = format!("its name; {:.0} characters on average{}", c.characters, missing(c));
        return Finding { table: CATALOGUE, ours: TITLE, theirs: Some(c.name.clone()), why, sure: true };
    }
    let differ = |c: &Column| c.distinct.len() * 2 > c.values && c.characters <= 200.0;
    match best(texts(), |c| if differ(c) { c.characters } else { 0.0 }) {
        Some((c, _)) => {
            let why =
                format!("text that differs from row to row, {:.0} characters on average{}", c.characters, missing(c));
            Finding { table: CATALOGUE, ours: TITLE, theirs: Some(c.name.clone()), why, sure: false }
        }
        None => nothing(CATALOGUE, TITLE, "no column has text that tells items apart; the LLM has nothing to read"),
    }
}

fn notes(log: &Looked, items: Option<&Looked>, found: &Guess) -> Vec<String> {
    let mut notes = Vec::new();
    let count = |looked: &Looked| match (looked.total_rows, looked.whole) {
        (_, true) => format!("all {} rows", looked.rows.num_rows()),
        (Some(all), _) => format!("{} of {all} rows", looked.rows.num_rows()),
        (None, _) => format!("the first {} rows", looked.rows.num_rows()),
    };
    let files =
        |looked: &Looked| if looked.files == 1 { "1 file".to_owned() } else { format!("{} files", looked.files) };
    for looked in std::iter::once(log).chain(items) {
        let layout = match (looked.csv, looked.config.header) {
            (true, true) => format!(", text with `{}` between fields", looked.config.delimiter.escape_default()),
            (true, false) => {
                let delimiter = looked.config.delimiter.escape_default();
                format!(", text with `{delimiter}` between fields and no header")
            }
            _ => String::new(),
        };
        notes.push(format!("{}: looked at {} ({}{layout})", looked.uri, count(looked), files(looked)));
    }
    let id = |ours| found.theirs(LOG, ours).and_then(|n| log.column(n));
    for c in [USER_ID, ITEM_ID].into_iter().filter_map(id).filter(|c| c.nulls > 0) {
        let share = 100.0 * c.nulls as f64 / (c.nulls + c.values) as f64;
        notes.push(format!("{} rows ({share:.1}%) have no `{}`; the reader sets them aside", c.nulls, c.name));
    }
    if found.ids_differ {
        notes.push("ids are numbers in one table and text in the other; the pipeline reads both as text".to_owned());
    }
    notes
}
