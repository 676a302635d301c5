//! A guess -> the text of a pipeline file, commented, for a person to go on from.
//!
//! In: what was looked at, what it means, and a few choices. Out: TOML. Without a text of the items it ends in a
//! recommender's top k; with one, in a fused table that an LLM has a small part in.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::columns::{Looked, Shape};
use super::guess::{CATALOGUE, FRACTIONAL, Guess, LOG};
use super::words;
use crate::columns::{ITEM_ID, RATING, TIMESTAMP, TITLE, USER_ID};

/// Choices that the files do not decide.
pub struct Choices<'a> {
    /// Name of the pipeline.
    pub name: &'a str,
    /// `root`, relative to the folder of the file, or absolute.
    pub root: &'a str,
    /// Value of `ds`.
    pub day: &'a str,
    /// The LLM; `None` for a pipeline without one.
    pub llm: Option<&'a str>,
    /// How the file is called in the comments that show commands.
    pub file: &'a str,
}

/// A string as TOML.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// A key as TOML: bare where that is allowed.
fn key(text: &str) -> String {
    let bare = !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
    if bare { text.to_owned() } else { quoted(text) }
}

fn inline(map: &BTreeMap<String, String>) -> String {
    let entries: Vec<String> = map.iter().map(|(k, v)| format!("{} = {}", key(k), quoted(v))).collect();
    format!("{{ {} }}", entries.join(", "))
}

/// The pipeline file.
pub fn draft(log: &Looked, items: Option<&Looked>, guess: &Guess, choices: &Choices<'_>) -> String {
    let title = items.and_then(|_| guess.theirs(CATALOGUE, TITLE));
    let llm = choices.llm.filter(|_| title.is_some());
    let mut text = String::new();
    let what = match llm {
        Some(_) => "a recommender, and an LLM for the users with the least history, fused into one table",
        None => "a recommender's best items for every user",
    };
    let mut line = |s: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{s}");
    };
    line(&format!("# Made by `tailfuse init` from your files: {what}."));
    line("#");
    for step in ["validate", "run"] {
        line(&format!("#   tailfuse {step} {}", choices.file));
    }
    line("#");
    line("# It evaluates itself: each user's last interaction is held out as test, the one before as validation.");
    line("# Every key is explained in docs/pipeline.md; docs/your-own-data.md goes on from here.");
    line("");
    line(&format!("name = {}", quoted(choices.name)));
    line(&format!("root = {}", quoted(choices.root)));
    line("seed = 42");
    line("");
    line("[params]");
    line("# The partition that is published: --param ds=...");
    line(&format!("ds = {}", quoted(choices.day)));
    line("");

    line("# Left of each `=` stands our name, right of it yours. What was guessed:");
    source(&mut text, LOG, log, guess);
    if let Some(items) = items {
        source(&mut text, CATALOGUE, items, guess);
    }
    let (log_table, item_table) = prepared(&mut text, log, items, guess);
    let whole = log.column(guess.theirs(LOG, ITEM_ID).unwrap_or_default()).map_or(0, |c| c.distinct.len());
    // A shortlist is a part of the catalogue, also where that is tiny.
    let shortlist = (whole / 2).clamp(1, 20);
    let k = shortlist.min(10);
    text.push_str(&format!(
        "\n[stages.parts]\nkind = \"split\"\ninput = \"{log_table}\"\n\
         \n# Other models: docs/pipeline.md#models; --set recommender.model=ease tries one for a run.\n\
         [stages.recommender]\nkind = \"train\"\nmodel = \"lightgcn\"\ntrain = \"parts.train\"\nvalid = \"parts.valid\"\n\
         \n# How much each user is in the tail.\n\
         [stages.tail]\nkind = \"sql\"\nfile = \"builtin:long_tail\"\ninputs = {{ history = \"parts.history\" }}\n\
         \n# What a user has seen is not recommended again.\n\
         [stages.shortlist]\nkind = \"recommend\"\nmodel = \"recommender.model\"\nhistory = \"parts.history\"\nk = {}\n",
        if llm.is_some() { shortlist } else { k }
    ));
    match llm {
        Some(llm) => {
            let names = [guess.theirs(CATALOGUE, ITEM_ID), guess.theirs(LOG, ITEM_ID), items.map(|i| i.uri.as_str())];
            let noun = words::noun(names.into_iter().flatten());
            text.push_str(&with_llm(&quoted(llm), noun, &item_table, k));
        }
        None => text.push_str(&without_llm(title.map(|_| item_table.as_str()))),
    }
    text
}

fn source(text: &mut String, table: &str, looked: &Looked, guess: &Guess) {
    for finding in guess.findings.iter().filter(|f| f.table == table) {
        let theirs = finding.theirs.as_deref().map_or_else(|| "nothing".to_owned(), |t| format!("`{t}`"));
        let unsure = if finding.sure { "" } else { "  <- look at this one" };
        let _ = writeln!(text, "#   {:<9} {theirs}: {}{unsure}", finding.ours, finding.why.replace('\n', " "));
    }
    let _ = writeln!(text, "[sources.{table}]\nuri = {}", quoted(&looked.uri));
    if let Some(format) = looked.config.format
        && let Ok(serde_json::Value::String(format)) = serde_json::to_value(format)
    {
        let _ = writeln!(text, "format = {}", quoted(&format));
    }
    if looked.csv && looked.config.delimiter != "," {
        let _ = writeln!(text, "delimiter = {}", quoted(&looked.config.delimiter));
    }
    if looked.csv && !looked.config.header {
        let _ = writeln!(text, "header = false");
    }
    let mapping = guess.mapping(table, looked);
    if !mapping.is_empty() {
        let _ = writeln!(text, "columns = {}", inline(&mapping));
    }
    if cast_at_reading(looked, table, guess) {
        let id = guess.theirs(table, ITEM_ID).unwrap_or_default();
        let _ = writeln!(text, "# Numbers here and text in the other table.");
        let _ = writeln!(text, "types = {{ {} = \"string\" }}", key(id));
    }
    text.push('\n');
}

/// Whether the ids of this table are the numbers of the two, and can be read as text.
fn cast_at_reading(looked: &Looked, table: &str, guess: &Guess) -> bool {
    guess.ids_differ && looked.csv && is_number(looked, table, guess)
}

fn is_number(looked: &Looked, table: &str, guess: &Guess) -> bool {
    guess.theirs(table, ITEM_ID).and_then(|n| looked.column(n)).is_some_and(|c| c.shape == Shape::Whole)
}

/// `sql` stages that the sources need before anything else, and the names of the tables after them.
fn prepared(text: &mut String, log: &Looked, items: Option<&Looked>, guess: &Guess) -> (String, String) {
    let mut names = (LOG.to_owned(), CATALOGUE.to_owned());
    let numbers = |looked: &Looked, table: &str| {
        guess.ids_differ && is_number(looked, table, guess) && !cast_at_reading(looked, table, guess)
    };
    let cast = numbers(log, LOG);
    if cast || guess.fractional_time.is_some() {
        let item = if cast { "cast(item_id as varchar) as item_id" } else { "item_id" };
        let mut columns = vec![USER_ID.to_owned(), item.to_owned()];
        if guess.theirs(LOG, RATING).is_some() {
            columns.push(RATING.to_owned());
        }
        if guess.fractional_time.is_some() {
            columns.push(format!("cast(floor({FRACTIONAL} * 1000) as bigint) as {TIMESTAMP}"));
        } else if guess.theirs(LOG, TIMESTAMP).is_some() {
            columns.push(TIMESTAMP.to_owned());
        }
        columns.push("row_id".to_owned());
        let _ = write!(
            text,
            "[stages.log]\nkind = \"sql\"\ninputs = {{ log = \"{LOG}\" }}\nquery = \"select {} from log\"\n",
            columns.join(", ")
        );
        names.0 = "log".to_owned();
    }
    if let Some(items) = items
        && numbers(items, CATALOGUE)
    {
        let title = if guess.theirs(CATALOGUE, TITLE).is_some() { ", title" } else { "" };
        let _ = write!(
            text,
            "\n[stages.item_table]\nkind = \"sql\"\ninputs = {{ items = \"{CATALOGUE}\" }}\n\
             query = \"select cast(item_id as varchar) as item_id{title}, row_id from items\"\n"
        );
        names.1 = "item_table".to_owned();
    }
    names
}

fn with_llm(llm: &str, noun: &str, items: &str, k: usize) -> String {
    format!(
        r#"
# The user most like each user, for the prompt.
[stages.neighbours]
kind = "similar"
embeddings = "recommender.user_embeddings"
n = 1

[stages.prompts]
kind = "prompt"
model = {llm}
shortlist = "shortlist"
history = "parts.history"
items = "{items}"
neighbours = "neighbours"
noun = "{noun}"

# The users with the least history are asked first. Raise the budget once the figures say that the LLM helps:
# `tailfuse plan` says what a budget costs, and answers are kept, so that only additional users are paid for.
[stages.rerank]
kind = "rerank"
model = {llm}
prompts = "prompts"
skipped = "prompts.skipped"
long_tail = "tail"
budget = {{ users = 20 }}

[stages.fused]
kind = "fuse"
shortlist = "shortlist"
rerank = "rerank.reranked"
not_asked = "rerank.not_asked"
long_tail = "tail"
items = "{items}"
model = "recommender.model"
llm = {llm}
k = {k}

[stages.quality]
kind = "evaluate"
shortlist = "fused.shortlist"
test = "parts.test"

[stages.publish]
kind = "write"
input = "fused"
table = "recommendations"
partition = {{ ds = "{{{{ ds }}}}" }}
"#
    )
}

fn without_llm(items: Option<&str>) -> String {
    let (stage, input) = match items {
        Some(items) => (
            format!(
                r#"
[stages.titles]
kind = "sql"
inputs = {{ items = "{items}" }}
query = "select item_id, title from items order by item_id"

[stages.with_titles]
kind = "sql"
inputs = {{ shortlist = "shortlist", titles = "titles" }}
query = """
select s.user_id, s.item_id, t.title, s.rec_rank as rank, s.rec_score
from shortlist s left join titles t on s.item_id = t.item_id
order by s.user_id, s.rec_rank
"""
"#
            ),
            "with_titles",
        ),
        None => (
            r#"
[stages.ranked]
kind = "sql"
inputs = { shortlist = "shortlist" }
query = "select user_id, item_id, rec_rank as rank, rec_score from shortlist order by user_id, rec_rank"
"#
            .to_owned(),
            "ranked",
        ),
    };
    format!(
        r#"
[stages.quality]
kind = "evaluate"
shortlist = "shortlist"
test = "parts.test"
long_tail = "tail"
{stage}
[stages.publish]
kind = "write"
input = "{input}"
table = "recommendations"
partition = {{ ds = "{{{{ ds }}}}" }}
"#
    )
}
