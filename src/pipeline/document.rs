//! The pipeline file as a tree that remembers where each key and value came from.
//!
//! In: the parsed TOML and the `--set` arguments. Out: what validation walks over, so that
//! every mistake can be shown at its place, and plain JSON for serde.

use std::ops::Range;
use std::sync::Arc;

/// Where a key or value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A byte range of the pipeline file.
    File(Range<usize>),
    /// A byte range of a command-line argument.
    Argument {
        /// The argument as typed, e.g. `--set lightgcn.hyper.layers=2`.
        text: Arc<str>,
        /// The part that is meant.
        span: Range<usize>,
    },
}

impl Origin {
    /// The first line's end of the place, for places that span several lines (a multi-line
    /// string): carets under one line say enough.
    pub fn first_line(&self, file: &str) -> Origin {
        let cut = |text: &str, span: &Range<usize>| {
            let part = text.get(span.clone()).unwrap_or_default();
            span.start..part.find('\n').map_or(span.end, |n| span.start + n)
        };
        match self {
            Origin::File(span) => Origin::File(cut(file, span)),
            Origin::Argument { text, span } => Origin::Argument { text: text.clone(), span: cut(text, span) },
        }
    }

    /// The first place of `word` inside this place, where it stands as a word; else the place itself.
    pub fn of_word(&self, word: &str, file: &str) -> Origin {
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let find = |text: &str, span: &Range<usize>| {
            let part = text.get(span.clone())?;
            part.match_indices(word).map(|(i, _)| i).find_map(|i| {
                let before = part[..i].chars().next_back().is_some_and(is_word);
                let after = part[i + word.len()..].chars().next().is_some_and(is_word);
                (!before && !after).then_some(span.start + i..span.start + i + word.len())
            })
        };
        match self {
            Origin::File(span) => Origin::File(find(file, span).unwrap_or_else(|| span.clone())),
            Origin::Argument { text, span } => {
                Origin::Argument { text: text.clone(), span: find(text, span).unwrap_or_else(|| span.clone()) }
            }
        }
    }

    /// Sort key: the file from top to bottom, then the arguments.
    pub fn order(&self) -> (bool, usize) {
        match self {
            Origin::File(span) => (false, span.start),
            Origin::Argument { span, .. } => (true, span.start),
        }
    }
}

/// A value and its place.
#[derive(Clone, Debug)]
pub struct Item {
    /// What was written.
    pub value: ItemValue,
    /// Where. Of a table: its header `[stages.x]`, or the braces of an inline table.
    pub origin: Origin,
    /// The text before it was read as TOML, where another reading is possible: the value of a
    /// `--set`, or a string that a template made. The schema decides which reading is meant.
    pub raw: Option<String>,
}

/// The kinds of values that TOML has.
#[derive(Clone, Debug)]
pub enum ItemValue {
    /// `"text"`.
    String(String),
    /// `1`.
    Integer(i64),
    /// `1.0`.
    Float(f64),
    /// `true`.
    Boolean(bool),
    /// `2026-11-22`, kept as text.
    Datetime(String),
    /// `[1, 2]`.
    Array(Vec<Item>),
    /// `[x]` or `{ }`, in the order of the file.
    Table(Vec<Entry>),
    /// A value that was reported already and is not looked at again.
    Invalid,
}

/// A key and its value.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Where the key was written.
    pub key_origin: Origin,
    /// The value.
    pub item: Item,
}

impl Item {
    /// A value at a place.
    pub fn new(value: ItemValue, origin: Origin) -> Self {
        Item { value, origin, raw: None }
    }

    /// The entries of a table; of anything else, none.
    pub fn entries(&self) -> &[Entry] {
        match &self.value {
            ItemValue::Table(entries) => entries,
            _ => &[],
        }
    }

    /// The entry of a table by its key.
    pub fn entry(&self, key: &str) -> Option<&Entry> {
        self.entries().iter().find(|e| e.key == key)
    }

    /// The value of a table by its key.
    pub fn get(&self, key: &str) -> Option<&Item> {
        self.entry(key).map(|e| &e.item)
    }

    /// The value at a dotted path of keys; a number indexes an array.
    pub fn at(&self, path: &str) -> Option<&Item> {
        path.split('.').try_fold(self, |item, part| match &item.value {
            ItemValue::Array(items) => part.parse::<usize>().ok().and_then(|i| items.get(i)),
            _ => item.get(part),
        })
    }

    /// A string's text.
    pub fn as_str(&self) -> Option<&str> {
        match &self.value {
            ItemValue::String(s) => Some(s),
            _ => None,
        }
    }

    /// The first value equal to the string `text`, here or below.
    pub fn find_string(&self, text: &str) -> Option<&Item> {
        match &self.value {
            ItemValue::String(s) => (s == text).then_some(self),
            ItemValue::Array(items) => items.iter().find_map(|i| i.find_string(text)),
            ItemValue::Table(entries) => entries.iter().find_map(|e| e.item.find_string(text)),
            _ => None,
        }
    }

    /// The value's type with its article, for messages.
    pub fn type_name(&self) -> &'static str {
        match self.value {
            ItemValue::String(_) => "a string",
            ItemValue::Integer(_) => "an integer",
            ItemValue::Float(_) => "a number",
            ItemValue::Boolean(_) => "a boolean",
            ItemValue::Datetime(_) => "a date",
            ItemValue::Array(_) => "a list",
            ItemValue::Table(_) => "a table",
            ItemValue::Invalid => "invalid",
        }
    }

    /// As JSON; dates become strings, what JSON lacks (nan, inf) becomes null.
    pub fn to_json(&self) -> serde_json::Value {
        match &self.value {
            ItemValue::String(s) | ItemValue::Datetime(s) => s.as_str().into(),
            ItemValue::Integer(n) => (*n).into(),
            ItemValue::Float(x) => (*x).into(),
            ItemValue::Boolean(b) => (*b).into(),
            ItemValue::Array(items) => items.iter().map(Item::to_json).collect(),
            ItemValue::Table(entries) => {
                serde_json::Value::Object(entries.iter().map(|e| (e.key.clone(), e.item.to_json())).collect())
            }
            ItemValue::Invalid => serde_json::Value::Null,
        }
    }
}
