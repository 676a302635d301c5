//! What the LLM is asked: the rows of the `prompt` stage, and prompts in tokens.
//!
//! In: the table `prompts`. Out: each user's prompts in order of permutation, and [`Question`]s with their ledger keys.

use std::collections::{BTreeMap, HashMap};

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::DataType;

use super::Mode;
use crate::columns::*;
use crate::error::{Error, Result};
use crate::tables::{Id, IdColumn, Table};

/// One prompt as the `prompt` stage made it.
pub(super) struct Prompt {
    pub(super) system: String,
    pub(super) prompt: String,
    /// As shown; indices into the shown order are what the LLM scores.
    pub(super) candidates: IdColumn,
    pub(super) titles: Vec<String>,
    pub(super) tokens: u64,
}

/// All prompts, and each user's rows in order of permutation.
pub(super) struct Prompts {
    pub(super) prompts: Vec<Prompt>,
    pub(super) rows: BTreeMap<Id, Vec<usize>>,
    pub(super) ids_are_int: bool,
    pub(super) item_type: DataType,
}

/// A prompt in tokens, with its key.
#[derive(Clone)]
pub(super) struct Question {
    pub(super) prompt_digest: String,
    pub(super) ids: Vec<u32>,
    /// One label token, or the tokens of one title, per candidate.
    pub(super) scored: Vec<Vec<u32>>,
    pub(super) mode: Mode,
}

impl Question {
    pub(super) fn tokens(&self) -> usize {
        let continuations = match self.mode {
            Mode::Label => 0,
            Mode::Likelihood => self.scored.iter().map(Vec::len).sum(),
        };
        self.ids.len() + continuations
    }
}

impl Prompts {
    pub(super) fn read(table: &Table) -> Result<Self> {
        let batch = table.to_batch()?;
        let users = table.ids(USER_ID)?;
        let permutations = table.i32s(PERMUTATION)?;
        let (systems, texts) = (table.strings(SYSTEM)?, table.strings(PROMPT)?);
        let tokens = table.i32s(PROMPT_TOKENS)?;
        let candidates = list_column(&batch, CANDIDATES)?;
        let titles = list_column(&batch, CANDIDATE_TITLES)?;
        let mut prompts = Vec::with_capacity(users.len());
        let mut rows: BTreeMap<Id, Vec<usize>> = BTreeMap::new();
        for row in 0..users.len() {
            let ids = IdColumn::try_from_array(CANDIDATES, &candidates.value(row))?;
            let names = Table::from_columns(vec![(TITLE, titles.value(row), true)])?.strings(TITLE)?;
            prompts.push(Prompt {
                system: systems[row].clone().unwrap_or_default(),
                prompt: texts[row].clone().unwrap_or_default(),
                candidates: ids,
                titles: names.into_iter().map(Option::unwrap_or_default).collect(),
                tokens: tokens[row].max(0) as u64,
            });
            rows.entry(users.get(row)).or_default().push(row);
        }
        for rows in rows.values_mut() {
            rows.sort_by_key(|&r| permutations[r]);
        }
        let item_type = candidates.value_type();
        Ok(Prompts { prompts, rows, ids_are_int: matches!(users, IdColumn::Int(_)), item_type })
    }

    pub(super) fn users(&self, ids: &[Id]) -> IdColumn {
        id_column(self.ids_are_int, ids)
    }
}

pub(super) fn id_column(int: bool, ids: &[Id]) -> IdColumn {
    match int {
        true => IdColumn::Int(ids.iter().map(|id| if let Id::Int(n) = id { *n } else { 0 }).collect()),
        false => IdColumn::Str(ids.iter().map(Id::to_string).collect()),
    }
}

pub(super) fn list_column<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a arrow::array::ListArray> {
    let column = batch.column_by_name(name).ok_or_else(|| Error::data(format!("column `{name}` is missing")))?;
    column
        .as_list_opt::<i32>()
        .ok_or_else(|| Error::data(format!("column `{name}` has type {}, a list is wanted", column.data_type())))
}

pub(super) fn interactions_of(table: &Table) -> Result<HashMap<Id, i64>> {
    let users = table.ids(USER_ID)?;
    Ok(table.i64s(INTERACTIONS)?.into_iter().enumerate().map(|(row, n)| (users.get(row), n)).collect())
}
