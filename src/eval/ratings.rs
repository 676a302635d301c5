//! RMSE and MAE of predicted ratings against held-out ones, by bucket.
//!
//! In: a table of predictions and the held-out ratings. Out: [`Evaluation`] in the tables of the ranking task, so
//! that one query reads both.

use std::collections::HashMap;

use crate::columns::{BUCKET, ITEM_ID, PREDICTED_RATING, RATING, REC_SCORE, USER_ID};
use crate::error::{Error, Result};
use crate::eval::buckets::Slice;
use crate::eval::evaluate::{ALL_USERS, ComparisonRows, EvaluateOptions, Evaluation, Group, MetricRows, RECOMMENDER};
use crate::eval::metrics::{METRICS, MetricFn};
use crate::tables::{Id, Table};

/// Columns that [`evaluate_ratings`] needs of the predictions.
pub const PREDICTION_COLUMNS: [&str; 3] = [USER_ID, ITEM_ID, PREDICTED_RATING];

/// Evaluates `predictions` (`user_id`, `item_id`, `predicted_rating`) against the ratings of `test` (`user_id`,
/// `item_id`, `rating`). `long_tail` (`user_id`, `bucket`) gives the users' buckets where the predictions have none.
/// A table with `rec_score` beside the final prediction has the recommender as a system of its own.
///
/// # Errors
/// A held-out pair without a prediction, a pair predicted twice, a rating or prediction that is no finite number,
/// an empty `test` (exit 65).
pub fn evaluate_ratings(
    predictions: &Table,
    test: &Table,
    long_tail: Option<&Table>,
    options: &EvaluateOptions,
) -> Result<Evaluation> {
    let wanted = numbers(test, RATING, "held-out ratings")?;
    if wanted.is_empty() {
        return Err(Error::data("held-out ratings: the table is empty, so that nothing can be evaluated"));
    }
    let rows = rows_of(predictions, test)?;
    let mut systems = vec![(options.system.as_str(), PREDICTED_RATING)];
    if predictions.has(REC_SCORE) && options.system != RECOMMENDER {
        systems.insert(0, (RECOMMENDER, REC_SCORE));
    }
    let buckets = buckets(predictions, test, long_tail, &rows)?;
    let mut report = MetricRows::default();
    for (system, column) in systems {
        let all = numbers(predictions, column, "predictions")?;
        for metric in METRICS {
            let MetricFn::WholeTable(function) = metric.function else { continue };
            for slice in Slice::EACH {
                let of = |n: &usize| slice.has(buckets[*n].as_deref());
                let places: Vec<usize> = (0..wanted.len()).filter(of).collect();
                if places.is_empty() {
                    continue;
                }
                let predicted: Vec<f64> = places.iter().map(|&n| all[rows[n]]).collect();
                let actual: Vec<f64> = places.iter().map(|&n| wanted[n]).collect();
                let group = Group { scope: ALL_USERS, slice: slice.name(), metric: metric.name, k: None };
                report.push(system, &group, function(&predicted, &actual), places.len());
            }
        }
    }
    let users = |table: &Table| -> Result<std::collections::HashSet<Id>> {
        let ids = table.ids(USER_ID)?;
        Ok((0..ids.len()).map(|row| ids.get(row)).collect())
    };
    let (evaluated, predicted) = (users(test)?, users(predictions)?);
    Ok(Evaluation {
        metrics: report.into_table(&options.protocol)?,
        comparison: ComparisonRows::default().into_table()?,
        users_evaluated: evaluated.len(),
        users_not_evaluated: predicted.difference(&evaluated).count(),
        users_without_list: 0,
        users_asked: 0,
        incomplete: Vec::new(),
    })
}

/// The row of `predictions` for each row of `test`.
fn rows_of(predictions: &Table, test: &Table) -> Result<Vec<usize>> {
    let pairs = |table: &Table, name: &str| -> Result<Vec<(Id, Id)>> {
        let at = |e: Error| e.at(name);
        let (users, items) = (table.ids(USER_ID).map_err(at)?, table.ids(ITEM_ID).map_err(at)?);
        Ok((0..users.len()).map(|row| (users.get(row), items.get(row))).collect())
    };
    let mut place = HashMap::new();
    for (row, (user, item)) in pairs(predictions, "predictions")?.into_iter().enumerate() {
        let told = format!("predictions: user `{user}` has item `{item}` twice");
        if place.insert((user, item), row).is_some() {
            return Err(Error::data(told).with_help("drop the repeats in a `sql` stage"));
        }
    }
    pairs(test, "held-out ratings")?
        .into_iter()
        .map(|pair| {
            place.get(&pair).copied().ok_or_else(|| {
                let told = format!("user `{}` and item `{}` are held out and have no prediction", pair.0, pair.1);
                Error::data(told).with_help("give the held-out table to the `predict` stage as `pairs`")
            })
        })
        .collect()
}

fn numbers(table: &Table, column: &str, what: &str) -> Result<Vec<f64>> {
    let values = table.f64s(column).map_err(|e| e.at(what))?;
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(values),
        Some(row) => Err(Error::data(format!("{what}: column `{column}` is {} in row {row} (0-based)", values[row]))
            .with_help("drop such rows in a `sql` stage")),
    }
}

/// The bucket of the user of each row of `test`.
fn buckets(
    predictions: &Table,
    test: &Table,
    long_tail: Option<&Table>,
    rows: &[usize],
) -> Result<Vec<Option<String>>> {
    let own = match predictions.has(BUCKET) {
        true => predictions.strings(BUCKET)?,
        false => Vec::new(),
    };
    let mut of = HashMap::new();
    if let Some(long_tail) = long_tail {
        let ids = long_tail.ids(USER_ID)?;
        for (row, bucket) in long_tail.strings(BUCKET)?.into_iter().enumerate() {
            of.insert(ids.get(row), bucket);
        }
    }
    let users = test.ids(USER_ID)?;
    let bucket = |(n, &row): (usize, &usize)| {
        own.get(row).cloned().flatten().or_else(|| of.get(&users.get(n)).cloned().flatten())
    };
    Ok(rows.iter().enumerate().map(bucket).collect())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Float64Array, Int64Array, StringArray};

    use super::*;
    use crate::columns::{K, METRIC, N, SYSTEM, VALUE};
    use crate::eval::evaluate::{FILE_ORDER, Protocol};

    fn table(rows: &[(i64, &str, f64)], name: &str) -> Table {
        Table::from_columns(vec![
            (USER_ID, Arc::new(Int64Array::from_iter_values(rows.iter().map(|r| r.0))) as ArrayRef, false),
            (ITEM_ID, Arc::new(StringArray::from_iter_values(rows.iter().map(|r| r.1))), false),
            (name, Arc::new(Float64Array::from_iter_values(rows.iter().map(|r| r.2))), false),
        ])
        .unwrap()
    }

    fn options() -> EvaluateOptions {
        let text = str::to_owned;
        EvaluateOptions {
            ks: vec![10],
            system: text("deepfm"),
            protocol: Protocol {
                history_at_test: text("train"),
                weights_fit_on: text("train"),
                ranking: text("pairs"),
                tie_rule: text(FILE_ORDER),
            },
        }
    }

    #[test]
    fn errors_of_all_and_of_each_bucket() {
        let predictions = table(&[(1, "a", 3.0), (2, "a", 5.0), (1, "b", 1.0), (9, "z", 4.0)], PREDICTED_RATING);
        let test = table(&[(1, "b", 3.0), (2, "a", 4.0)], RATING);
        let tail = Table::from_columns(vec![
            (USER_ID, Arc::new(Int64Array::from(vec![1])) as ArrayRef, false),
            (BUCKET, Arc::new(StringArray::from(vec!["tail"])), false),
        ])
        .unwrap();
        let found = evaluate_ratings(&predictions, &test, Some(&tail), &options()).unwrap();
        let metrics = &found.metrics;
        let strings = |name: &str| metrics.strings(name).unwrap().into_iter().flatten().collect::<Vec<_>>();
        assert_eq!(strings(METRIC), ["RMSE", "RMSE", "MAE", "MAE"]);
        assert_eq!(strings(BUCKET), ["all", "tail", "all", "tail"]);
        assert!(strings(SYSTEM).iter().all(|s| s == "deepfm"));
        // Errors are -2 and 1: sqrt(5 / 2), 3 / 2.
        assert_eq!(metrics.f64s(VALUE).unwrap(), [2.5f64.sqrt(), 2.0, 1.5, 2.0]);
        assert_eq!(metrics.i64s(N).unwrap(), [2, 1, 2, 1]);
        assert_eq!(arrow::array::Array::null_count(metrics.column(K).unwrap().as_ref()), 4);
        assert_eq!((found.users_evaluated, found.users_not_evaluated), (2, 1));
    }

    #[test]
    fn what_cannot_be_measured_is_named() {
        let good = [(1, "a", 3.0), (2, "a", 5.0)];
        let refused = |predictions: &[(i64, &str, f64)], test: &[(i64, &str, f64)], word: &str| {
            let (p, t) = (table(predictions, PREDICTED_RATING), table(test, RATING));
            let error = evaluate_ratings(&p, &t, None, &options()).unwrap_err();
            assert!(error.fault.exit_code() == 65 && error.message.contains(word), "{error}");
        };
        refused(&good, &[(1, "z", 3.0)], "item `z`");
        refused(&good, &[], "empty");
        refused(&good, &[(1, "a", f64::NAN)], "row 0");
        refused(&[(1, "a", f64::INFINITY)], &[(1, "a", 3.0)], "`predicted_rating`");
        refused(&[(1, "a", 3.0), (1, "a", 3.0)], &[(1, "a", 3.0)], "twice");
    }
}
