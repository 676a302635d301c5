//! What the LLM answered: one order of the candidates per user.
//!
//! In: questions and the ledger. Out: the tables `reranked` and `not_asked`.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use arrow::array::{ArrayRef, Float32Array, Int32Array, StringArray, TimestampMicrosecondArray};

use super::questions::{Prompts, Question, id_column};
use crate::columns::*;
use crate::error::{Error, Result};
use crate::llm::ledger::{Answer, Ledger};
use crate::stages::StageContext;
use crate::tables::{Id, IdColumn, Table};

/// The table `reranked`: per user the mean score of each candidate over the permutations.
pub(super) fn orders(
    prompts: &Prompts,
    asked: &[Id],
    questions: &[Question],
    ledger: &Ledger,
    ctx: &StageContext,
) -> Result<Table> {
    let mut next = questions.iter();
    let mut out = Orders::default();
    for user in asked {
        let rows = &prompts.rows[user];
        let mut sums: HashMap<Id, (f64, usize)> = HashMap::new();
        let mut first: Option<&Answer> = None;
        for &row in rows {
            let question = next.next().ok_or_else(|| Error::internal("fewer questions than prompts"))?;
            let answer = ledger.get(&question.prompt_digest).ok_or_else(|| {
                Error::internal(format!("stage `{}`: an answered prompt is not in the ledger", ctx.name))
            })?;
            first = first.or(Some(answer));
            for (place, &score) in answer.scores.iter().enumerate() {
                let entry = sums.entry(prompts.prompts[row].candidates.get(place)).or_insert((0.0, 0));
                entry.0 += f64::from(score);
                entry.1 += 1;
            }
        }
        let Some(answer) = first else { continue };
        // Ties keep the order of permutation 0.
        let shown = &prompts.prompts[rows[0]].candidates;
        let mut order: Vec<(usize, f64)> = (0..shown.len())
            .map(|place| {
                let (sum, n) = sums.get(&shown.get(place)).copied().unwrap_or((f64::NEG_INFINITY, 1));
                (place, sum / n as f64)
            })
            .collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        for (rank, (place, score)) in order.into_iter().enumerate() {
            out.users.push(user.clone());
            out.items.push(shown.get(place));
            out.ranks.push(rank as i32 + 1);
            out.scores.push(score as f32);
            out.digests.push(answer.prompt_digest.clone());
            out.asked_at.push(answer.asked_at);
        }
    }
    out.into_table(prompts)
}

#[derive(Default)]
struct Orders {
    users: Vec<Id>,
    items: Vec<Id>,
    ranks: Vec<i32>,
    scores: Vec<f32>,
    digests: Vec<String>,
    asked_at: Vec<i64>,
}

impl Orders {
    fn into_table(self, prompts: &Prompts) -> Result<Table> {
        let items_are_int = prompts.item_type.is_integer();
        let n = self.ranks.len();
        Table::from_columns(vec![
            (USER_ID, prompts.users(&self.users).to_array(), false),
            (ITEM_ID, id_column(items_are_int, &self.items).to_array(), false),
            (LLM_RANK, Arc::new(Int32Array::from(self.ranks)) as ArrayRef, false),
            (LLM_SCORE, Arc::new(Float32Array::from(self.scores)), false),
            (PROMPT_DIGEST, Arc::new(StringArray::from(self.digests)), false),
            (LLM_ASKED_AT, Arc::new(TimestampMicrosecondArray::from(self.asked_at).with_timezone("UTC")), false),
            (SOURCE, Arc::new(StringArray::from(vec!["fused"; n])), false),
        ])
    }
}

/// Users that the budget left out, then those without a prompt.
pub(super) fn not_asked(left_out: &[Id], skipped: Option<Table>) -> Result<Table> {
    let mut users: Vec<Id> = left_out.to_vec();
    let mut reasons = vec!["budget".to_owned(); users.len()];
    if let Some(skipped) = &skipped {
        let ids = skipped.ids(USER_ID)?;
        let known: HashSet<Id> = users.iter().cloned().collect();
        for (row, reason) in skipped.strings(REASON)?.into_iter().enumerate() {
            if !known.contains(&ids.get(row)) {
                users.push(ids.get(row));
                reasons.push(reason.unwrap_or_else(|| "no_title".into()));
            }
        }
    }
    // An empty table still has the type of the ids.
    let int = match (users.first(), &skipped) {
        (Some(id), _) => matches!(id, Id::Int(_)),
        (None, Some(skipped)) => matches!(skipped.ids(USER_ID)?, IdColumn::Int(_)),
        (None, None) => true,
    };
    let n = users.len();
    Table::from_columns(vec![
        (USER_ID, id_column(int, &users).to_array(), false),
        (SOURCE, Arc::new(StringArray::from(vec!["recommender"; n])) as ArrayRef, false),
        (REASON, Arc::new(StringArray::from(reasons)), false),
    ])
}
