//! The metrics of a ranked table: recommender, LLM and fused side by side, by bucket.
//!
//! In: a table with users, items and ranks (a stage's output or the published file) and the
//! held-out items. Out: [`Evaluation`]: the `metrics` and `comparison` tables as declared in
//! [`crate::tables::schemas`], and counts.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Float64Array, Int32Array, Int64Array, StringArray};
use arrow::datatypes::{DataType, Int32Type};

use crate::columns::{BUCKET, ITEM_ID, LLM_RANK, RANK, REC_RANK, SOURCE, USER_ID};
use crate::error::{Error, Result};
use crate::eval::buckets::Slice;
use crate::eval::metrics::{Found, ranking_metrics};
use crate::eval::paired::{PairedTest, paired_t_test};
use crate::eval::ranking::{RankedTable, UserRanking};
use crate::tables::schemas::{EVALUATION_COMPARISON, EVALUATION_METRICS};
use crate::tables::{Id, Table};

/// The recommender's order, column `rec_rank`.
pub const RECOMMENDER: &str = "recommender";
/// The LLM's order, column `llm_rank`; items that it was not shown at the recommender's place.
pub const LLM: &str = "llm";
/// The final order, column `rank`, unless the options name it otherwise.
pub const FUSED: &str = "fused";
/// Every user with a held-out item.
pub const ALL_USERS: &str = "all";
/// The users with a held-out item that the LLM was asked for.
pub const ASKED_USERS: &str = "asked";

/// The tie rule of the splits: of interactions of equal time, the later row of the file is the later one.
pub const FILE_ORDER: &str = "file order";

/// How an evaluation was done; every row of the metrics says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// What was known of a user when ranking: `train+valid` or `train`.
    pub history_at_test: String,
    /// What the recommender's weights were fitted on.
    pub weights_fit_on: String,
    /// `full`: ranked among all items that the user has not interacted with.
    pub ranking: String,
    /// Which of the interactions of equal time is the last.
    pub tie_rule: String,
}

/// What to evaluate.
#[derive(Clone, Debug)]
pub struct EvaluateOptions {
    /// Cut-offs, each >= 1.
    pub ks: Vec<usize>,
    /// Name of the system in column `rank`.
    pub system: String,
    /// How the ranks came about.
    pub protocol: Protocol,
}

/// What an evaluation found.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// [`EVALUATION_METRICS`].
    pub metrics: Table,
    /// [`EVALUATION_COMPARISON`].
    pub comparison: Table,
    /// Users with a held-out item.
    pub users_evaluated: usize,
    /// Users with a list and no held-out item; they are recommended for, not evaluated.
    pub users_not_evaluated: usize,
    /// Users with a held-out item and no list; they count as 0.
    pub users_without_list: usize,
    /// Users with a held-out item that the LLM was asked for.
    pub users_asked: usize,
    /// `system` or `system@k` that could not be reported, since the table lacks some of its places.
    pub incomplete: Vec<String>,
}

/// Evaluates `table` against the held-out items of `test`.
///
/// `table` has `user_id`, `item_id` and at least one of `rank`, `rec_rank`, `llm_rank`; where it
/// has a `bucket`, figures are by bucket too, and `long_tail` (`user_id`, `bucket`) gives the
/// bucket of users without a list or of a table without that column. `test` has `user_id`,
/// `item_id`. Errors (exit 65): no rank column, a rank below 1, an item twice on a list, no
/// held-out item, or no system whose order is complete to any cut-off.
pub fn evaluate(
    table: &Table,
    test: &Table,
    long_tail: Option<&Table>,
    options: &EvaluateOptions,
) -> Result<Evaluation> {
    let ranked = RankedTable::new(table, test)?;
    let evaluated = ranked.evaluated();
    if evaluated.is_empty() {
        return Err(Error::data("held-out items: the table is empty, so that nobody can be evaluated")
            .with_help("a user needs at least three interactions for a leave-one-out split"));
    }
    let ranks = Ranks::from_table(table, &options.system)?;
    let asked: Vec<bool> = evaluated.iter().map(|&u| ranked.rows(u).iter().any(|&r| ranks.asked(r))).collect();
    let buckets = user_buckets(table, long_tail, &ranked, &evaluated)?;
    let lists = |system: &System| -> Vec<UserRanking> {
        evaluated.iter().map(|&u| ranked.find(u, |row| ranks.of(system, row))).collect()
    };
    let ranked_by: Vec<(&System, Vec<UserRanking>)> = ranks.systems.iter().map(|s| (s, lists(s))).collect();

    let mut report = Report::default();
    for scope in [ALL_USERS, ASKED_USERS] {
        let in_scope: Vec<bool> = asked.iter().map(|&a| scope == ALL_USERS || a).collect();
        for &k in &options.ks {
            let systems = report.complete(&ranked_by, scope, &in_scope, k);
            for (metric, function) in ranking_metrics() {
                let label = format!("{metric}@{k}");
                let values: Vec<(&str, Vec<f64>)> =
                    systems.iter().map(|(name, lists)| (*name, per_user(lists, function, k))).collect();
                for slice in Slice::EACH {
                    let users: Vec<usize> =
                        (0..evaluated.len()).filter(|&i| in_scope[i] && slice.has(buckets[i].as_deref())).collect();
                    report.add(&Group { scope, slice: slice.name(), metric: &label, k: Some(k) }, &values, &users);
                }
            }
        }
    }
    if report.rows.key.is_empty() {
        return Err(Error::data("ranked table: places are missing in every order, so that nothing can be evaluated")
            .with_help("evaluate the `shortlist` output of the `fuse` stage, or ranks without gaps"));
    }
    Ok(Evaluation {
        metrics: report.rows.into_table(&options.protocol)?,
        comparison: report.tests.into_table()?,
        users_evaluated: evaluated.len(),
        users_not_evaluated: ranked.n_users() - evaluated.len(),
        users_without_list: evaluated.iter().filter(|&&u| ranked.rows(u).is_empty()).count(),
        users_asked: asked.iter().filter(|&&a| a).count(),
        incomplete: report.incomplete,
    })
}

fn per_user(lists: &[UserRanking], function: fn(&Found, usize) -> f64, k: usize) -> Vec<f64> {
    lists.iter().map(|l| function(&l.found, k)).collect()
}

/// A system and the column with its ranks.
struct System {
    name: String,
    column: &'static str,
}

/// The rank columns of a table.
struct Ranks {
    systems: Vec<System>,
    rank: Vec<i64>,
    rec: Vec<i64>,
    llm: Vec<Option<i64>>,
    by_llm: Vec<bool>,
}

impl Ranks {
    fn from_table(table: &Table, final_name: &str) -> Result<Ranks> {
        let column = |name: &'static str| match table.has(name) {
            true => table.i64s(name),
            false => Ok(Vec::new()),
        };
        let (rank, rec) = (column(RANK)?, column(REC_RANK)?);
        let llm: Vec<Option<i64>> = match table.has(LLM_RANK) {
            true => {
                let a = table.column_as(LLM_RANK, &DataType::Int32)?;
                a.as_primitive::<Int32Type>().iter().map(|x| x.map(i64::from)).collect()
            }
            false => Vec::new(),
        };
        let by_llm = match table.has(SOURCE) {
            true => table.strings(SOURCE)?.iter().map(|s| matches!(s.as_deref(), Some("fused" | "reused"))).collect(),
            false => Vec::new(),
        };
        let each = [(RECOMMENDER, REC_RANK), (LLM, LLM_RANK), (final_name, RANK)];
        let systems: Vec<System> = each
            .into_iter()
            .filter(|(_, column)| table.has(column))
            .map(|(name, column)| System { name: name.to_owned(), column })
            .collect();
        if systems.is_empty() {
            return Err(Error::data("ranked table: it has none of the columns `rank`, `rec_rank`, `llm_rank`")
                .with_help("name a column with 1-based ranks `rank` in a `sql` stage"));
        }
        for (name, ranks) in [(RANK, &rank), (REC_RANK, &rec)] {
            if let Some(row) = ranks.iter().position(|&r| r < 1) {
                return Err(below_one(name, ranks[row], row));
            }
        }
        if let Some(row) = llm.iter().position(|r| r.is_some_and(|r| r < 1)) {
            return Err(below_one(LLM_RANK, llm[row].unwrap_or_default(), row));
        }
        Ok(Ranks { systems, rank, rec, llm, by_llm })
    }

    /// The rank of a row in a system's order. An item that the LLM was not shown has the
    /// recommender's place in the LLM's order; without a recommender's rank it comes last.
    fn of(&self, system: &System, row: usize) -> i64 {
        match system.column {
            RANK => self.rank[row],
            REC_RANK => self.rec[row],
            _ => self.llm[row].or_else(|| self.rec.get(row).copied()).unwrap_or(i64::MAX),
        }
    }

    /// Whether the LLM had a say in a row.
    fn asked(&self, row: usize) -> bool {
        self.llm.get(row).is_some_and(Option::is_some) || self.by_llm.get(row).copied().unwrap_or(false)
    }
}

fn below_one(column: &str, rank: i64, row: usize) -> Error {
    Error::data(format!("ranked table: column `{column}` is {rank} in row {row} (0-based)"))
        .with_help("ranks count from 1")
}

/// The bucket of each evaluated user, from the table's rows or from the long-tail table.
fn user_buckets(
    table: &Table,
    long_tail: Option<&Table>,
    ranked: &RankedTable,
    evaluated: &[usize],
) -> Result<Vec<Option<String>>> {
    let own = match table.has(BUCKET) {
        true => table.strings(BUCKET)?,
        false => Vec::new(),
    };
    let mut of: std::collections::HashMap<Id, String> = std::collections::HashMap::new();
    if let Some(long_tail) = long_tail {
        let ids = long_tail.ids(USER_ID)?;
        for (row, bucket) in long_tail.strings(BUCKET)?.into_iter().enumerate() {
            if let Some(bucket) = bucket {
                of.insert(ids.get(row), bucket);
            }
        }
    }
    let first = |&user: &usize| {
        let row = ranked.rows(user).first().and_then(|&r| own.get(r).cloned().flatten());
        row.or_else(|| of.get(&ranked.user(user)).cloned())
    };
    Ok(evaluated.iter().map(first).collect())
}

/// What figures are of, whatever the system.
pub(super) struct Group<'a> {
    pub scope: &'a str,
    pub slice: &'a str,
    pub metric: &'a str,
    pub k: Option<usize>,
}

/// The rows of both tables as they come.
#[derive(Default)]
struct Report {
    rows: MetricRows,
    tests: ComparisonRows,
    incomplete: Vec<String>,
}

impl Report {
    /// The systems that can be reported for a group of users: those whose lists are complete to
    /// place `k` for every one of them. The LLM has no order for users that it was not asked for.
    fn complete<'a>(
        &mut self,
        systems: &'a [(&System, Vec<UserRanking>)],
        scope: &str,
        in_scope: &[bool],
        k: usize,
    ) -> Vec<(&'a str, &'a [UserRanking])> {
        let mut found = Vec::new();
        for (system, lists) in systems.iter().filter(|(s, _)| scope == ASKED_USERS || s.name != LLM) {
            let name = format!("{}@{k}", system.name);
            if lists.iter().zip(in_scope).all(|(list, &counts)| !counts || list.complete_to >= k) {
                found.push((system.name.as_str(), lists.as_slice()));
            } else if !self.incomplete.contains(&name) {
                self.incomplete.push(name);
            }
        }
        found
    }

    /// Adds the rows of one group of users: the mean of each system's `values`, and its paired
    /// test against the recommender. A group of nobody has no row.
    fn add(&mut self, group: &Group<'_>, values: &[(&str, Vec<f64>)], users: &[usize]) {
        if users.is_empty() {
            return;
        }
        let of = |v: &[f64]| -> Vec<f64> { users.iter().map(|&i| v[i]).collect() };
        let baseline = values.iter().find(|(name, _)| *name == RECOMMENDER).map(|(_, v)| of(v));
        for (system, v) in values {
            let v = of(v);
            self.rows.push(system, group, v.iter().sum::<f64>() / v.len() as f64, v.len());
            if let (Some(baseline), true) = (&baseline, *system != RECOMMENDER) {
                self.tests.push(system, group, &paired_t_test(&v, baseline));
            }
        }
    }
}

/// The columns that both tables start with.
#[derive(Default)]
struct KeyColumns {
    system: Vec<String>,
    scope: Vec<String>,
    slice: Vec<String>,
    metric: Vec<String>,
    k: Vec<Option<i32>>,
}

impl KeyColumns {
    fn push(&mut self, system: &str, key: &Group<'_>) {
        self.system.push(system.to_owned());
        self.scope.push(key.scope.to_owned());
        self.slice.push(key.slice.to_owned());
        self.metric.push(key.metric.to_owned());
        self.k.push(key.k.map(|k| k as i32));
    }

    fn is_empty(&self) -> bool {
        self.k.is_empty()
    }

    fn into_arrays(self) -> [ArrayRef; 5] {
        let text = |v: Vec<String>| Arc::new(StringArray::from(v)) as ArrayRef;
        [text(self.system), text(self.scope), text(self.slice), text(self.metric), Arc::new(Int32Array::from(self.k))]
    }
}

#[derive(Default)]
pub(super) struct MetricRows {
    key: KeyColumns,
    value: Vec<f64>,
    n: Vec<i64>,
}

impl MetricRows {
    pub(super) fn push(&mut self, system: &str, group: &Group<'_>, value: f64, n: usize) {
        self.key.push(system, group);
        self.value.push(value);
        self.n.push(n as i64);
    }

    pub(super) fn into_table(self, protocol: &Protocol) -> Result<Table> {
        let rows = self.n.len();
        let same = |text: &str| Arc::new(StringArray::from_iter_values(vec![text; rows])) as ArrayRef;
        let [system, scope, slice, metric, k] = self.key.into_arrays();
        let value = Arc::new(Float64Array::from(self.value));
        let n = Arc::new(Int64Array::from(self.n));
        let arrays = vec![
            system,
            scope,
            slice,
            metric,
            k,
            value,
            n,
            same(&protocol.history_at_test),
            same(&protocol.weights_fit_on),
            same(&protocol.ranking),
            same(&protocol.tie_rule),
        ];
        EVALUATION_METRICS.table(&DataType::Utf8, &DataType::Utf8, arrays)
    }
}

#[derive(Default)]
pub(super) struct ComparisonRows {
    key: KeyColumns,
    n: Vec<i64>,
    mean: Vec<f64>,
    t: Vec<Option<f64>>,
    p: Vec<Option<f64>>,
}

impl ComparisonRows {
    fn push(&mut self, system: &str, group: &Group<'_>, test: &PairedTest) {
        self.key.push(system, group);
        self.n.push(test.n as i64);
        self.mean.push(test.mean_difference);
        self.t.push(test.t);
        self.p.push(test.p);
    }

    pub(super) fn into_table(self) -> Result<Table> {
        let baseline = StringArray::from_iter_values(vec![RECOMMENDER; self.n.len()]);
        let [system, scope, slice, metric, k] = self.key.into_arrays();
        let arrays: Vec<ArrayRef> = vec![
            system,
            Arc::new(baseline),
            scope,
            slice,
            metric,
            k,
            Arc::new(Int64Array::from(self.n)),
            Arc::new(Float64Array::from(self.mean)),
            Arc::new(Float64Array::from(self.t)),
            Arc::new(Float64Array::from(self.p)),
        ];
        EVALUATION_COMPARISON.table(&DataType::Utf8, &DataType::Utf8, arrays)
    }
}

/// Columns that [`evaluate`] needs of the ranked table, beside a rank.
pub const TABLE_COLUMNS: [&str; 2] = [USER_ID, ITEM_ID];
