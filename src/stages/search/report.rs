//! The tables of a search.
//!
//! In: the fits as they ended. Out: [`SEARCH_TRIALS`] and [`SEARCH_CONFIRMED`].

use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, Float64Array, Int32Array, Int64Array, StringArray};
use arrow::datatypes::DataType;

use super::trials::{Setting, Trial};
use crate::error::Result;
use crate::tables::Table;
use crate::tables::schemas::{SEARCH_CONFIRMED, SEARCH_TRIALS};

fn text<S: AsRef<str>>(values: impl Iterator<Item = S>) -> ArrayRef {
    // Arrow wants to know how many there are.
    Arc::new(StringArray::from_iter_values(values.collect::<Vec<S>>()))
}

/// One row per setting and seed.
pub(super) fn trials_table(metric: &str, settings: &[Setting], trials: &[Trial], chosen: usize) -> Result<Table> {
    let ok = |t: &Trial| t.outcome.status == "ok";
    let epochs = |of: fn(&Trial) -> usize| -> ArrayRef {
        Arc::new(trials.iter().map(|t| ok(t).then(|| of(t) as i32)).collect::<Int32Array>())
    };
    let setting = |t: &Trial| &settings[t.setting];
    let arrays: Vec<ArrayRef> = vec![
        Arc::new(trials.iter().map(|t| Some(t.setting as i32 + 1)).collect::<Int32Array>()),
        Arc::new(trials.iter().map(|t| Some(t.seed as i64)).collect::<Int64Array>()),
        text(trials.iter().map(|t| setting(t).drawn.to_string())),
        text(trials.iter().map(|t| setting(t).hyper.to_string())),
        text(trials.iter().map(|_| metric)),
        Arc::new(trials.iter().map(|t| t.outcome.valid).collect::<Float64Array>()),
        epochs(|t| t.outcome.best_epoch),
        epochs(|t| t.outcome.epochs),
        Arc::new(trials.iter().map(|t| Some(t.outcome.seconds)).collect::<Float64Array>()),
        text(trials.iter().map(|t| t.outcome.status.as_str())),
        Arc::new(trials.iter().map(|t| t.outcome.message.as_deref()).collect::<StringArray>()),
        Arc::new(trials.iter().map(|t| Some(t.setting == chosen)).collect::<BooleanArray>()),
    ];
    SEARCH_TRIALS.table(&DataType::Utf8, &DataType::Utf8, arrays)
}

/// One row per seed and metric.
pub(super) fn confirmed_table(metric: &str, history_at_test: &str, confirmed: &[Trial]) -> Result<Table> {
    let rows = || confirmed.iter().flat_map(|t| t.outcome.test.iter().map(move |figure| (t, figure)));
    let arrays: Vec<ArrayRef> = vec![
        Arc::new(rows().map(|(t, _)| Some(t.seed as i64)).collect::<Int64Array>()),
        text(rows().map(|(_, f)| f.metric.as_str())),
        Arc::new(rows().map(|(_, f)| f.k.map(|k| k as i32)).collect::<Int32Array>()),
        Arc::new(rows().map(|(_, f)| Some(f.value)).collect::<Float64Array>()),
        Arc::new(rows().map(|(_, f)| Some(f.n as i64)).collect::<Int64Array>()),
        text(rows().map(|_| metric)),
        Arc::new(rows().map(|(t, _)| t.outcome.valid).collect::<Float64Array>()),
        Arc::new(rows().map(|(t, _)| Some(t.outcome.best_epoch as i32)).collect::<Int32Array>()),
        text(rows().map(|(t, _)| t.outcome.weights_fit_on.as_str())),
        text(rows().map(|_| history_at_test)),
        text(rows().map(|_| crate::eval::evaluate::FILE_ORDER)),
    ];
    SEARCH_CONFIRMED.table(&DataType::Utf8, &DataType::Utf8, arrays)
}
