//! What the LLM answered: one order of the candidates per user.
//!
//! In: questions, the ledger, failures, earlier orders that are kept. Out: the tables `reranked`, `not_asked` and
//! `order_bias`, in which every user has exactly one end.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use arrow::array::{ArrayRef, Float32Array, Float64Array, Int32Array, StringArray, TimestampMicrosecondArray};

use super::questions::{Prompts, Question, id_column};
use crate::columns::*;
use crate::error::{Error, Result};
use crate::llm::ledger::orders::{GivenOrder, carry_over};
use crate::llm::ledger::{Answer, Ledger};
use crate::tables::{Id, IdColumn, Table};

/// An earlier order in today's shortlist.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    /// Best first; the score where the LLM gave one.
    pub(super) items: Vec<(Id, Option<f32>)>,
    pub(super) prompt_digest: String,
    pub(super) asked_at: i64,
}

impl Kept {
    /// The earlier order, where it holds for today's shortlist (`today` in the recommender's order).
    pub(super) fn of(earlier: &GivenOrder, today: &[Id], overlap: f64) -> Option<Self> {
        let names: Vec<String> = today.iter().map(Id::to_string).collect();
        let carried = carry_over(&earlier.items, &names);
        if carried.overlap < overlap {
            return None;
        }
        let scores: HashMap<&String, f32> = earlier.items.iter().zip(earlier.scores.iter().copied()).collect();
        let items = carried.order.iter().map(|&p| (today[p].clone(), scores.get(&names[p]).copied())).collect();
        Some(Kept { items, prompt_digest: earlier.prompt_digest.clone(), asked_at: earlier.asked_at })
    }
}

/// Everything that was found out.
pub(super) struct Outcome {
    pub(super) reranked: Orders,
    pub(super) bias: Bias,
    /// Users without any answer, and why.
    pub(super) failed: Vec<(Id, &'static str)>,
    /// The orders that were given now, for the ledger's second level.
    pub(super) given: Vec<GivenOrder>,
}

/// Per asked user the mean score of each candidate over the permutations that were answered.
///
/// `questions` has each asked user's, in order of permutation. `settings` is for the orders that later runs may keep.
pub(super) fn orders(
    prompts: &Prompts,
    asked: &[(Id, Vec<Question>)],
    ledger: &Ledger,
    failures: &HashMap<String, &'static str>,
    settings: &str,
) -> Result<Outcome> {
    let mut out = Outcome { reranked: Orders::default(), bias: Bias::default(), failed: Vec::new(), given: Vec::new() };
    for (user, questions) in asked {
        let mut sums: HashMap<Id, (f64, usize)> = HashMap::new();
        let mut answers: Vec<(&Question, &Answer)> = Vec::new();
        let mut why = None;
        for question in questions {
            match (ledger.get(&question.prompt_digest), failures.get(&question.prompt_digest)) {
                (Some(answer), _) => answers.push((question, answer)),
                (None, Some(reason)) => why = why.or(Some(*reason)),
                (None, None) => return Err(Error::internal("a prompt has neither an answer nor a reason")),
            }
        }
        let Some((first_question, first)) = answers.first().copied() else {
            out.failed.push((user.clone(), why.unwrap_or("unanswered")));
            continue;
        };
        let mut each: Vec<Vec<Id>> = Vec::with_capacity(answers.len());
        for (question, answer) in &answers {
            let shown = &prompts.prompts[question.row].candidates;
            let mut order: Vec<(usize, f32)> = answer.scores.iter().copied().enumerate().take(shown.len()).collect();
            for (place, score) in &order {
                let entry = sums.entry(shown.get(*place)).or_insert((0.0, 0));
                entry.0 += f64::from(*score);
                entry.1 += 1;
            }
            if questions.len() > 1 && shown.len() > 1 {
                order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                each.push(order.into_iter().map(|(place, _)| shown.get(place)).collect());
            }
        }
        // Permutations show the same candidates, ratings are asked one by one. Ties keep the order in which they were shown.
        let mut once = HashSet::new();
        let shown: Vec<Id> = (answers.iter())
            .flat_map(|(question, _)| {
                let candidates = &prompts.prompts[question.row].candidates;
                (0..candidates.len()).map(|place| candidates.get(place))
            })
            .filter(|item| once.insert(item.clone()))
            .collect();
        let mut order: Vec<(usize, f64)> = (shown.iter().enumerate())
            .map(|(place, item)| {
                let (sum, n) = sums.get(item).copied().unwrap_or((f64::NEG_INFINITY, 1));
                (place, sum / n as f64)
            })
            .collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let order: Vec<(Id, f32)> =
            order.into_iter().map(|(place, score)| (shown[place].clone(), score as f32)).collect();
        if let (Some(history), true) =
            (&prompts.prompts[first_question.row].history_digest, answers.len() == questions.len())
        {
            out.given.push(GivenOrder {
                user: user.to_string(),
                history_digest: history.clone(),
                settings: settings.to_owned(),
                items: order.iter().map(|(item, _)| item.to_string()).collect(),
                scores: order.iter().map(|(_, score)| *score).collect(),
                prompt_digest: first.prompt_digest.clone(),
                asked_at: answers.iter().map(|(_, a)| a.asked_at).min().unwrap_or(first.asked_at),
            });
        }
        if each.len() > 1 {
            out.bias.push(user, &each);
        }
        let items = order.into_iter().map(|(item, score)| (item, Some(score))).collect();
        let kept = Kept { items, prompt_digest: first.prompt_digest.clone(), asked_at: first.asked_at };
        out.reranked.push(user, kept, "fused");
    }
    Ok(out)
}

/// The rows of `reranked`.
#[derive(Default)]
pub(super) struct Orders {
    users: Vec<Id>,
    items: Vec<Id>,
    ranks: Vec<i32>,
    scores: Vec<Option<f32>>,
    digests: Vec<String>,
    asked_at: Vec<i64>,
    sources: Vec<&'static str>,
}

impl Orders {
    /// Adds a user's order.
    pub(super) fn push(&mut self, user: &Id, order: Kept, source: &'static str) {
        for (rank, (item, score)) in order.items.into_iter().enumerate() {
            self.users.push(user.clone());
            self.items.push(item);
            self.ranks.push(rank as i32 + 1);
            self.scores.push(score);
            self.digests.push(order.prompt_digest.clone());
            self.asked_at.push(order.asked_at);
            self.sources.push(source);
        }
    }

    pub(super) fn into_table(self, prompts: &Prompts) -> Result<Table> {
        let items_are_int = prompts.item_type.is_integer();
        Table::from_columns(vec![
            (USER_ID, prompts.users(&self.users).to_array(), false),
            (ITEM_ID, id_column(items_are_int, &self.items).to_array(), false),
            (LLM_RANK, Arc::new(Int32Array::from(self.ranks)) as ArrayRef, false),
            (LLM_SCORE, Arc::new(Float32Array::from(self.scores)), true),
            (PROMPT_DIGEST, Arc::new(StringArray::from(self.digests)), false),
            (LLM_ASKED_AT, Arc::new(TimestampMicrosecondArray::from(self.asked_at).with_timezone("UTC")), false),
            (SOURCE, Arc::new(StringArray::from(self.sources)), false),
        ])
    }
}

/// How much the place at which a candidate is shown matters to the LLM: the rows of `order_bias`.
#[derive(Default)]
pub(super) struct Bias {
    users: Vec<Id>,
    prompts: Vec<i32>,
    firsts: Vec<i32>,
    changed: Vec<f64>,
    tau: Vec<f64>,
}

impl Bias {
    /// Adds a user with the order of each permutation, at least two.
    fn push(&mut self, user: &Id, orders: &[Vec<Id>]) {
        let later = &orders[1..];
        let first = |order: &Vec<Id>| order.first().cloned();
        let firsts: HashSet<Option<Id>> = orders.iter().map(first).collect();
        let changed = later.iter().filter(|o| first(o) != first(&orders[0])).count();
        let tau: f64 = later.iter().map(|o| kendall_tau(&orders[0], o)).sum();
        self.users.push(user.clone());
        self.prompts.push(orders.len() as i32);
        self.firsts.push(firsts.len() as i32);
        self.changed.push(changed as f64 / later.len() as f64);
        self.tau.push(tau / later.len() as f64);
    }

    /// Users with several answered prompts, in how many of these another item came first than in the first one (mean
    /// share), and the mean tau; nothing without such users.
    pub(super) fn means(&self) -> Option<(usize, f64, f64)> {
        let n = self.users.len();
        let mean = |v: &[f64]| v.iter().sum::<f64>() / n as f64;
        (n > 0).then(|| (n, mean(&self.changed), mean(&self.tau)))
    }

    pub(super) fn into_table(self, prompts: &Prompts) -> Result<Table> {
        Table::from_columns(vec![
            (USER_ID, prompts.users(&self.users).to_array(), false),
            (PROMPTS, Arc::new(Int32Array::from(self.prompts)) as ArrayRef, false),
            (FIRST_PLACES, Arc::new(Int32Array::from(self.firsts)), false),
            (FIRST_CHANGED, Arc::new(Float64Array::from(self.changed)), false),
            (KENDALL_TAU, Arc::new(Float64Array::from(self.tau)), false),
        ])
    }
}

/// Kendall's tau of two orders of the same items: 1 where they agree in every pair, -1 where in none. 1 for fewer than two items.
fn kendall_tau(a: &[Id], b: &[Id]) -> f64 {
    let place: HashMap<&Id, usize> = b.iter().enumerate().map(|(p, item)| (item, p)).collect();
    let places: Vec<usize> = a.iter().filter_map(|item| place.get(item).copied()).collect();
    let n = places.len();
    if n < 2 {
        return 1.0;
    }
    let agree: usize = (0..n).map(|i| places[i + 1..].iter().filter(|p| **p > places[i]).count()).sum();
    let pairs = n * (n - 1) / 2;
    (2.0 * agree as f64 - pairs as f64) / pairs as f64
}

/// Users that were left out, with the reason, those without an answer, then those without a prompt.
pub(super) fn not_asked(
    (left_out, why): (&[Id], &str),
    failed: &[(Id, &'static str)],
    skipped: Option<Table>,
) -> Result<Table> {
    let mut users: Vec<Id> = left_out.to_vec();
    let mut reasons = vec![why.to_owned(); users.len()];
    let mut sources = vec!["recommender"; users.len()];
    for (user, reason) in failed {
        users.push(user.clone());
        reasons.push((*reason).to_owned());
        sources.push("fallback");
    }
    if let Some(skipped) = &skipped {
        let ids = skipped.ids(USER_ID)?;
        let known: HashSet<Id> = users.iter().cloned().collect();
        for (row, reason) in skipped.strings(REASON)?.into_iter().enumerate() {
            if !known.contains(&ids.get(row)) {
                users.push(ids.get(row));
                reasons.push(reason.unwrap_or_else(|| "no_title".into()));
                sources.push("recommender");
            }
        }
    }
    // An empty table still has the type of the ids.
    let int = match (users.first(), &skipped) {
        (Some(id), _) => matches!(id, Id::Int(_)),
        (None, Some(skipped)) => matches!(skipped.ids(USER_ID)?, IdColumn::Int(_)),
        (None, None) => true,
    };
    Table::from_columns(vec![
        (USER_ID, id_column(int, &users).to_array(), false),
        (SOURCE, Arc::new(StringArray::from(sources)) as ArrayRef, false),
        (REASON, Arc::new(StringArray::from(reasons)), false),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(items: &[i64]) -> Vec<Id> {
        items.iter().copied().map(Id::Int).collect()
    }

    #[test]
    fn tau_of_orders() {
        assert_eq!(kendall_tau(&ids(&[1, 2, 3]), &ids(&[1, 2, 3])), 1.0);
        assert_eq!(kendall_tau(&ids(&[1, 2, 3]), &ids(&[3, 2, 1])), -1.0);
        assert!((kendall_tau(&ids(&[1, 2, 3]), &ids(&[1, 3, 2])) - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!(kendall_tau(&ids(&[1]), &ids(&[1])), 1.0);
    }

    #[test]
    fn changes_of_the_first_place_are_counted() {
        let mut bias = Bias::default();
        assert_eq!(bias.means(), None);
        bias.push(&Id::Int(1), &[ids(&[1, 2]), ids(&[1, 2]), ids(&[2, 1])]);
        bias.push(&Id::Int(2), &[ids(&[1, 2]), ids(&[1, 2])]);
        assert_eq!((bias.firsts.as_slice(), bias.changed.as_slice()), (&[2, 1][..], &[0.5, 0.0][..]));
        assert_eq!(bias.means(), Some((2, 0.25, 0.5)));
    }

    #[test]
    fn an_earlier_order_holds_while_the_lists_overlap() {
        let earlier = GivenOrder {
            user: "5".into(),
            history_digest: "h".into(),
            settings: "s".into(),
            items: ["3", "1", "2"].map(str::to_owned).to_vec(),
            scores: vec![-0.1, -0.2, -0.3],
            prompt_digest: "d".into(),
            asked_at: 7,
        };
        let kept = Kept::of(&earlier, &ids(&[1, 9, 3]), 0.6).unwrap();
        assert_eq!(kept.items, [(Id::Int(3), Some(-0.1)), (Id::Int(9), None), (Id::Int(1), Some(-0.2))]);
        assert_eq!((kept.prompt_digest.as_str(), kept.asked_at), ("d", 7));
        assert!(Kept::of(&earlier, &ids(&[1, 9, 3]), 0.7).is_none());
    }

    #[test]
    fn every_reason_has_its_source() {
        let table = not_asked((&ids(&[1]), "budget"), &[(Id::Int(2), "timeout")], None).unwrap();
        assert_eq!(table.i64s(USER_ID).unwrap(), [1, 2]);
        let text = |name: &str| table.strings(name).unwrap().into_iter().flatten().collect::<Vec<_>>();
        assert_eq!(
            (text(SOURCE), text(REASON)),
            (vec!["recommender".to_owned(), "fallback".into()], vec!["budget".to_owned(), "timeout".into()])
        );
    }
}
