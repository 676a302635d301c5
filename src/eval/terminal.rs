//! The metrics as text tables for a terminal of 100 columns.
//!
//! In: the `metrics` and `comparison` tables of an evaluation. Out: one string.

use comfy_table::{Cell, CellAlignment, Table as TextTable, presets};
use std::collections::HashMap;
use std::fmt::Write;

use crate::columns::{
    BASELINE, BUCKET, DRAWS, FILE_ORDER, FILE_ORDER_REFIT, HISTORY_AT_TEST, MAX, MEAN, MEAN_DIFFERENCE, METRIC, MIN, N,
    P, RANKING, SD, SYSTEM, TIE_RULE, USERS, VALUE, WEIGHTS_FIT_ON,
};
use crate::error::Result;
use crate::eval::buckets::Slice;
use crate::eval::evaluate::{ALL_USERS, ASKED_USERS};
use crate::tables::Table;

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{DataType, Float64Type};

/// The metrics that are shown where they are there.
const SHOWN: [&str; 7] = ["Hit@3", "NDCG@3", "Hit@5", "NDCG@5", "NDCG@10", "RMSE", "MAE"];
/// How many are shown where none of those is there; as many as fit.
const MOST: usize = 6;

/// Renders the tables of one evaluation: each system over all users, then over those that the LLM was asked for,
/// and the paired tests of NDCG (of the greatest cut-off that is shown). Columns as declared for
/// the `evaluate` stage; an error says which is missing.
pub fn render(metrics: &Table, comparison: &Table) -> Result<String> {
    let figures = Figures::from_table(metrics)?;
    let mut text = String::new();
    for scope in [ALL_USERS, ASKED_USERS] {
        let Some(n) = figures.n(scope, Slice::All) else { continue };
        if !text.is_empty() {
            text.push('\n');
        }
        let users = if n == 1 { "user" } else { "users" };
        let title = match scope {
            // Of ratings, not of users.
            ALL_USERS if figures.shown.iter().any(|m| m == "RMSE") => {
                format!("All {n} held-out ratings\n{}", figures.protocol)
            }
            ALL_USERS => format!("All {n} {users} with a held-out item\n{}", figures.protocol),
            _ => format!("The {n} {users} of them that the LLM was asked for"),
        };
        let _ = writeln!(text, "{title}\n{}", figures.table(scope));
    }
    let tests = tests(comparison, figures.shown.last().map_or("", |m| m.as_str()))?;
    if !tests.is_empty() {
        let _ = write!(text, "\n{tests}");
    }
    Ok(text)
}

/// The metrics table by what its rows are of.
struct Figures {
    /// (scope, bucket, system, metric) -> (value, n).
    of: HashMap<(String, String, String, String), (f64, i64)>,
    systems: Vec<String>,
    shown: Vec<String>,
    protocol: String,
}

impl Figures {
    fn from_table(metrics: &Table) -> Result<Figures> {
        let [scope, bucket, system, metric] =
            [USERS, BUCKET, SYSTEM, METRIC].map(|c| metrics.strings(c).map(some_text));
        let (scope, bucket, system, metric) = (scope?, bucket?, system?, metric?);
        let (values, ns) = (metrics.f64s(VALUE)?, metrics.i64s(N)?);
        let mut of = HashMap::new();
        for (row, (&value, &n)) in values.iter().zip(&ns).enumerate() {
            let key = (scope[row].clone(), bucket[row].clone(), system[row].clone(), metric[row].clone());
            of.insert(key, (value, n));
        }
        let present = in_order(&metric);
        let mut shown: Vec<String> = SHOWN.iter().map(|m| (*m).to_owned()).filter(|m| present.contains(m)).collect();
        if shown.is_empty() {
            shown = present.into_iter().take(MOST).collect();
        }
        let said = |column: &str| -> Result<String> {
            Ok(some_text(metrics.strings(column)?).into_iter().next().unwrap_or_default())
        };
        let rest = format!("weights fitted on: {}, ties: {}", said(WEIGHTS_FIT_ON)?, said(TIE_RULE)?);
        let protocol = match said(RANKING)?.as_str() {
            // Nothing is ranked, and no history is read.
            "pairs" => format!("({rest})"),
            ranking => format!("({ranking} ranking, known at test: {}, {rest})", said(HISTORY_AT_TEST)?),
        };
        // The LLM has no row over all users: take the order of the systems from the asked ones.
        let asked: Vec<String> =
            system.iter().zip(&scope).filter(|(_, s)| *s == ASKED_USERS).map(|(name, _)| name.clone()).collect();
        let systems = in_order(&[asked, system].concat());
        Ok(Figures { of, systems, shown, protocol })
    }

    fn get(&self, scope: &str, slice: Slice, system: &str, metric: &str) -> Option<(f64, i64)> {
        let key = (scope.to_owned(), slice.name().to_owned(), system.to_owned(), metric.to_owned());
        self.of.get(&key).copied()
    }

    /// How many users a group has; `None` when it has no figure.
    fn n(&self, scope: &str, slice: Slice) -> Option<i64> {
        let mut each = self.systems.iter().flat_map(|s| self.shown.iter().map(move |m| (s, m)));
        each.find_map(|(s, m)| self.get(scope, slice, s, m)).map(|(_, n)| n)
    }

    fn table(&self, scope: &str) -> String {
        let mut table = TextTable::new();
        table.load_preset(presets::ASCII_MARKDOWN);
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        let mut head = vec![Cell::new("users"), right("n".to_owned()), Cell::new("system")];
        head.extend(self.shown.iter().cloned().map(right));
        table.set_header(head);
        for slice in Slice::EACH {
            let Some(n) = self.n(scope, slice) else { continue };
            let mut first = true;
            for system in &self.systems {
                let values: Vec<Option<(f64, i64)>> =
                    self.shown.iter().map(|m| self.get(scope, slice, system, m)).collect();
                if values.iter().all(Option::is_none) {
                    continue;
                }
                let (group, count) = if first { (slice.name().to_owned(), n.to_string()) } else { Default::default() };
                first = false;
                let mut row = vec![Cell::new(group), right(count), Cell::new(system)];
                row.extend(values.into_iter().map(|v| right(v.map_or("-".to_owned(), |(v, _)| format!("{v:.4}")))));
                table.add_row(row);
            }
        }
        table.to_string()
    }
}

/// The paired tests of one metric, a line each, where the LLM changed anything to test.
fn tests(comparison: &Table, metric: &str) -> Result<String> {
    let [scope, bucket, system, baseline, metrics] =
        [USERS, BUCKET, SYSTEM, BASELINE, METRIC].map(|c| comparison.strings(c).map(some_text));
    let (scope, bucket, system, baseline, metrics) = (scope?, bucket?, system?, baseline?, metrics?);
    let (means, ns) = (comparison.f64s(MEAN_DIFFERENCE)?, comparison.i64s(N)?);
    let p = comparison.column_as(P, &DataType::Float64)?;
    let p = p.as_primitive::<Float64Type>();
    let mut text = String::new();
    for row in (0..comparison.num_rows()).filter(|&r| metrics[r] == metric && bucket[r] == Slice::All.name()) {
        let p = if p.is_null(row) { "not defined".to_owned() } else { format!("{:.3}", p.value(row)) };
        let users = if scope[row] == ALL_USERS { "all users" } else { "users asked for" };
        let _ = writeln!(
            text,
            "{metric}, {users}: {} - {} = {:+.4} (paired t-test over {}, p {p})",
            system[row], baseline[row], means[row], ns[row]
        );
    }
    Ok(text)
}

/// The spread over random orders of ties, a line per metric.
///
/// # Errors
/// A column is missing.
pub fn render_ties(ties: &Table) -> Result<String> {
    let mut table = TextTable::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    let head = ["metric", FILE_ORDER, FILE_ORDER_REFIT, MEAN, SD, MIN, MAX];
    table.set_header(head.map(|h| right(h.replace('_', " "))));
    let metrics = some_text(ties.strings(METRIC)?);
    let numbers: Vec<ArrayRef> = [FILE_ORDER, FILE_ORDER_REFIT, MEAN, SD, MIN, MAX]
        .iter()
        .map(|name| ties.column_as(name, &DataType::Float64))
        .collect::<Result<_>>()?;
    for (row, metric) in metrics.iter().enumerate() {
        let mut cells = vec![Cell::new(metric)];
        for column in &numbers {
            let column = column.as_primitive::<Float64Type>();
            cells.push(right(if column.is_null(row) { "-".to_owned() } else { format!("{:.4}", column.value(row)) }));
        }
        table.add_row(cells);
    }
    let draws = ties.i64s(DRAWS)?.first().copied().unwrap_or_default();
    Ok(format!(
        "The recommender with interactions of equal time in file order, and in {draws} random orders (fitted again for each)\n{table}"
    ))
}

/// Mean and standard deviation over the seeds of each search, a line per search. One text per kind of metrics.
///
/// # Errors
/// A column is missing.
pub fn render_confirmed(searches: &[(String, Table)]) -> Result<Vec<String>> {
    // (metrics, protocol) -> lines; searches of both tasks may be in one pipeline.
    type Key = (Vec<String>, String);
    let mut texts: Vec<(Key, TextTable)> = Vec::new();
    for (name, confirmed) in searches {
        let metrics = some_text(confirmed.strings(METRIC)?);
        let values = confirmed.f64s(VALUE)?;
        let said = |column: &str| -> Result<String> {
            Ok(some_text(confirmed.strings(column)?).into_iter().next().unwrap_or_default())
        };
        let protocol = format!(
            "known at test: {}, weights fitted on: {}, ties: {}",
            said(HISTORY_AT_TEST)?,
            said(WEIGHTS_FIT_ON)?,
            said(TIE_RULE)?
        );
        let key = (in_order(&metrics), protocol);
        let place = match texts.iter().position(|(k, _)| *k == key) {
            Some(place) => place,
            None => {
                let mut table = TextTable::new();
                table.load_preset(presets::ASCII_MARKDOWN);
                let mut head = vec![Cell::new("search"), Cell::new("seeds")];
                head.extend(key.0.iter().map(|m| Cell::new(m).set_alignment(CellAlignment::Right)));
                table.set_header(head);
                texts.push((key.clone(), table));
                texts.len() - 1
            }
        };
        let mut row = vec![Cell::new(name)];
        for (n, metric) in key.0.iter().enumerate() {
            let of: Vec<f64> = metrics.iter().zip(&values).filter(|(m, _)| *m == metric).map(|(_, v)| *v).collect();
            if n == 0 {
                row.push(Cell::new(of.len()));
            }
            let mean = of.iter().sum::<f64>() / of.len() as f64;
            let spread = (of.len() > 1)
                .then(|| (of.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (of.len() - 1) as f64).sqrt());
            let text = spread.map_or(format!("{mean:.4}"), |sd| format!("{mean:.4} ({sd:.4})"));
            row.push(Cell::new(text).set_alignment(CellAlignment::Right));
        }
        texts[place].1.add_row(row);
    }
    Ok(texts
        .into_iter()
        .map(|((_, protocol), table)| {
            format!(
                "The best setting of each search on test: mean over seeds (standard deviation)\n({protocol})\n{table}"
            )
        })
        .collect())
}

fn some_text(column: Vec<Option<String>>) -> Vec<String> {
    column.into_iter().map(Option::unwrap_or_default).collect()
}

/// The distinct values in the order in which they first occur.
fn in_order(values: &[String]) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for v in values {
        if !found.contains(v) {
            found.push(v.clone());
        }
    }
    found
}
