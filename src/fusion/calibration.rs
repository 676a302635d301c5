//! Which a1 and a2 to serve with: every pair of a grid is fused on validation, and the
//! smallest that is no worse than the best, within the noise of the sample, is taken.
//!
//! In: shortlists with the LLM's places, validation items, long-tail coefficients. Out: the
//! grid with what each pair reached, and the [`Calibration`] that serving reads.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::columns::{ITEM_ID, USER_ID};
use crate::error::{Error, Result};
use crate::fusion::long_tail::{Bounds, LongTail, Weights};
use crate::fusion::shortlists::{Shortlists, encode};
use crate::tables::Table;

/// Name of the file in the artifact.
pub const FILE: &str = "calibration.json";
/// Format of [`FILE`]; raised when its fields change their meaning.
pub const FORMAT: u32 = 1;
/// Cut-off of the NDCG that pairs are compared by.
pub const CUT_OFF: usize = 10;
/// Name of the metric that pairs are compared by.
pub const METRIC: &str = "NDCG@10";

/// What an evaluation chose, as serving reads it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// [`FORMAT`].
    pub version: u32,
    /// The LLM's mode whose orders were compared, as the pipeline names it.
    pub mode: String,
    /// Chosen a1, in [0, 1].
    pub a1: f64,
    /// Chosen a2, in [0, 1).
    pub a2: f64,
    /// C of the position utilities.
    pub c: f64,
    /// Least long-tail coefficient over all users.
    pub l_min: f64,
    /// Greatest long-tail coefficient over all users.
    pub l_max: f64,
    /// The metric that was compared, `NDCG@10`.
    pub metric: String,
    /// How the pair was chosen, `one-standard-error` or `highest-mean`.
    pub rule: String,
    /// Users in the sample: ranked by the LLM, with a validation item.
    pub n_users: u64,
    /// Mean of the metric under the chosen pair.
    pub mean: f64,
    /// Mean of the metric under a1 = 0, the recommender alone.
    pub recommender_mean: f64,
    /// Standard error of `mean` over the users; none below two.
    #[serde(default)]
    pub se: Option<f64>,
    /// Standard error of `recommender_mean`.
    #[serde(default)]
    pub recommender_se: Option<f64>,
    /// The pair with the highest mean.
    pub best: BestCell,
    /// The recommender that was fused, where the stage was given it: serving fits it again on everything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recommender: Option<FittedAs>,
    /// What made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made: Option<Made>,
}

/// How the recommender of a calibration was fitted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FittedAs {
    /// Name of the backbone.
    pub model: String,
    /// Its hyper-parameters in full.
    pub hyper: serde_json::Value,
    /// Epochs that were best on validation. Serving has no validation items to stop by, so their number travels. None for
    /// a model without epochs.
    pub epochs: Option<u64>,
    /// Its figures on validation, `valid_ndcg_10`.
    pub metrics: BTreeMap<String, f64>,
    /// sha256 of its files.
    pub sha256: String,
}

/// Where a calibration comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// When, RFC 3339.
    pub at: String,
    /// The run.
    pub run_id: String,
    /// Digest of all that the choice depends on: settings and the contents of the inputs.
    pub from: String,
}

/// The pair with the highest mean.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestCell {
    /// Its a1.
    pub a1: f64,
    /// Its a2.
    pub a2: f64,
    /// Its mean.
    pub mean: f64,
}

impl Calibration {
    /// The weights.
    pub fn weights(&self) -> Weights {
        Weights { a1: self.a1, a2: self.a2 }
    }

    /// The bounds that travel with the choice: one new user with an endless history must not
    /// move everyone's weight overnight.
    pub fn bounds(&self) -> Bounds {
        Bounds { l_min: self.l_min, l_max: self.l_max }
    }

    /// As the content of [`FILE`].
    pub fn to_bytes(&self) -> Result<Bytes> {
        let mut text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::internal("the calibration cannot be written as JSON").because(e))?;
        text.push('\n');
        Ok(Bytes::from(text))
    }

    /// From the content of [`FILE`]. Errors (exit 65): not JSON, another format, numbers out
    /// of range.
    pub fn from_bytes(bytes: &[u8]) -> Result<Calibration> {
        let help =
            "make it again with the pipeline that has the `calibrate` stage: tailfuse run pipelines/calibrate.toml";
        let read: Calibration = serde_json::from_slice(bytes)
            .map_err(|e| Error::data(format!("`{FILE}` is not a calibration")).because(e).with_help(help))?;
        if read.version != FORMAT {
            return Err(Error::data(format!("`{FILE}` has format {}, this version reads {FORMAT}", read.version))
                .with_help(help));
        }
        let bounds = read.l_min.is_finite() && read.l_max.is_finite() && read.l_min <= read.l_max;
        let weights = Weights::new(read.a1, read.a2, FILE).is_ok();
        if !(weights && bounds && read.c.is_finite() && read.c > 0.0) {
            return Err(Error::data(format!(
                "`{FILE}` is out of range: a1 {}, a2 {}, c {}, l_min {}, l_max {}",
                read.a1, read.a2, read.c, read.l_min, read.l_max
            ))
            .with_help(help));
        }
        Ok(read)
    }
}

/// One pair of weights and what it reached.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GridCell {
    /// Which of the LLM's modes, by its place among those that were compared.
    pub mode: usize,
    /// a1 of eq. 7.
    pub a1: f64,
    /// a2 of eq. 7; 0 where a1 is 0.
    pub a2: f64,
    /// Mean NDCG@10 over the users.
    pub mean: f64,
    /// Mean over the users of the best cell's NDCG@10 less this one's, >= 0.
    pub difference: f64,
    /// Standard error of `difference`; `None` below two users.
    pub se: Option<f64>,
    /// Standard error of `mean`; `None` below two users.
    pub mean_se: Option<f64>,
    /// Whether this is the best cell.
    pub best: bool,
    /// Whether this is the chosen cell.
    pub chosen: bool,
}

/// How a pair is chosen among those that were tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The smallest pair within one standard error of the best.
    OneStandardError,
    /// The best pair.
    HighestMean,
}

/// The pairs that are tried, in the order of preference: (0, 0) first, then by a1, then by a2.
pub fn grid(a1: &[f64], a2: &[f64]) -> Result<Vec<Weights>> {
    let sorted = |values: &[f64]| {
        let mut v: Vec<f64> = values.to_vec();
        v.sort_by(f64::total_cmp);
        v.dedup();
        v
    };
    let mut cells = vec![Weights { a1: 0.0, a2: 0.0 }];
    for &x in sorted(a1).iter() {
        for &y in sorted(a2).iter() {
            let cell = Weights::new(x, y, "the grid")?;
            // a1 = 0 is the recommender alone whatever a2 says, and it is there already.
            if cell.a1 > 0.0 {
                cells.push(cell);
            }
        }
    }
    Ok(cells)
}

/// The metric of every user of the sample under every cell.
#[derive(Clone, Debug)]
pub struct Trial {
    /// The cells: the LLM's mode by its place, and weights; in the order of preference.
    pub cells: Vec<(usize, Weights)>,
    /// `[cells][users]`.
    pub values: Vec<Vec<f64>>,
    /// Users that the LLM ranked for in every mode and that have no validation item, left out.
    pub users_without_valid: usize,
}

/// Fuses every user that the LLM ranked for under every cell, by the code that serves.
///
/// `modes` has the same shortlists once per mode of the LLM, with its ranks in that mode; at least one. Cells are compared
/// on the same users: those ranked in every mode. `valid` has `user_id`, `item_id`; of several rows of a user the first counts.
/// `metric` is given the 1-based place of the validation item in the fused order, `None` where
/// it is not on the shortlist.
pub fn try_cells(
    modes: &[Shortlists],
    valid: &Table,
    long_tail: &LongTail,
    weights: Vec<Weights>,
    c: f64,
    metric: impl Fn(Option<usize>) -> f64,
) -> Result<Trial> {
    let first = modes.first().ok_or_else(|| Error::internal("a calibration without ranks"))?;
    let users = encode(first.users(), &valid.ids(USER_ID)?, USER_ID)?;
    let items = encode(first.items(), &valid.ids(ITEM_ID)?, ITEM_ID)?;
    let mut held_out: Vec<Option<Option<u32>>> = vec![None; first.users().len()];
    for (user, item) in users.into_iter().zip(items) {
        if let Some(user) = user {
            held_out[user as usize].get_or_insert(item);
        }
    }
    let asked: Vec<usize> = (0..first.users().len()).filter(|&u| modes.iter().all(|m| m.asked(u))).collect();
    let sample: Vec<usize> = asked.iter().copied().filter(|&u| held_out[u].is_some()).collect();
    let bounds = long_tail.bounds();
    let value = |&(mode, cell): &(usize, Weights), user: usize| {
        let lists: &Shortlists = &modes[mode];
        let Some(item) = held_out[user].flatten() else { return metric(None) };
        let history = long_tail.of(&lists.users().ids().get(user));
        let order = lists.fuse(user, cell.alpha(history.coefficient, &bounds), c);
        let place = order.iter().position(|f| lists.of(user)[f.index].candidate.item == item);
        metric(place.map(|p| p + 1))
    };
    // The recommender alone is the same in every mode.
    let of_modes = |w: Weights| (0..if w.a1 > 0.0 { modes.len() } else { 1 }).map(move |mode| (mode, w));
    let cells: Vec<(usize, Weights)> = weights.into_iter().flat_map(of_modes).collect();
    let values = cells.iter().map(|cell| sample.iter().map(|&u| value(cell, u)).collect()).collect();
    Ok(Trial { cells, values, users_without_valid: asked.len() - sample.len() })
}

/// Compares the cells and chooses one.
///
/// The best cell has the highest mean (the first such in the order of preference). Under
/// [`Rule::OneStandardError`] the first cell, in that order, whose mean is less than the
/// best's by at most one standard error is chosen. The standard error is that of the *paired*
/// difference: with d_u = NDCG_u(best) - NDCG_u(cell), it is sd(d) / sqrt(n), sd with n - 1.
/// Both cells are measured on the same users, most of whom have the same NDCG under both: the
/// spread between users, which is most of the error of a mean, is not in the comparison. An
/// unpaired error would be several times as wide and choose the recommender alone whatever
/// the LLM is worth. Below two users there is no error to speak of, and nothing speaks for the
/// LLM: the first cell, a1 = 0, is chosen.
pub fn choose(trial: &Trial, rule: Rule) -> Vec<GridCell> {
    let means: Vec<f64> = trial.values.iter().map(|v| mean(v)).collect();
    let mut best = 0;
    for (cell, &m) in means.iter().enumerate() {
        if m > means[best] {
            best = cell;
        }
    }
    let compared: Vec<(f64, Option<f64>)> = trial
        .values
        .iter()
        .map(|v| {
            let d: Vec<f64> = trial.values[best].iter().zip(v).map(|(b, x)| b - x).collect();
            (mean(&d), standard_error(&d))
        })
        .collect();
    let few = compared.iter().all(|(_, se)| se.is_none());
    let chosen = match rule {
        _ if few => 0,
        Rule::HighestMean => best,
        Rule::OneStandardError => {
            compared.iter().position(|&(difference, se)| se.is_some_and(|se| difference <= se)).unwrap_or(best)
        }
    };
    trial
        .cells
        .iter()
        .enumerate()
        .map(|(i, &(mode, w))| GridCell {
            mode,
            a1: w.a1,
            a2: w.a2,
            mean: means[i],
            difference: compared[i].0,
            se: compared[i].1,
            mean_se: standard_error(&trial.values[i]),
            best: i == best,
            chosen: i == chosen,
        })
        .collect()
}

fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

/// sd(x) / sqrt(n), sd with n - 1; `None` below two values.
fn standard_error(values: &[f64]) -> Option<f64> {
    let n = values.len() as f64;
    (values.len() > 1).then(|| {
        let m = mean(values);
        let variance = values.iter().map(|x| (x - m).powi(2)).sum::<f64>() / (n - 1.0);
        (variance / n).sqrt()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(values: &[&[f64]]) -> Trial {
        let cells = grid(&[0.1, 0.5], &[0.1, 0.3]).unwrap()[..values.len()].iter().map(|&w| (0, w)).collect();
        Trial { cells, values: values.iter().map(|v| v.to_vec()).collect(), users_without_valid: 0 }
    }

    fn chosen(cells: &[GridCell]) -> (f64, f64) {
        let all: Vec<&GridCell> = cells.iter().filter(|c| c.chosen).collect();
        assert_eq!(all.len(), 1);
        (all[0].a1, all[0].a2)
    }

    #[test]
    fn the_grid_prefers_small_weights_and_has_the_recommender_alone_once() {
        let cells = grid(&[0.5, 0.0, 0.1], &[0.3, 0.1]).unwrap();
        let pairs: Vec<(f64, f64)> = cells.iter().map(|c| (c.a1, c.a2)).collect();
        assert_eq!(pairs, [(0.0, 0.0), (0.1, 0.1), (0.1, 0.3), (0.5, 0.1), (0.5, 0.3)]);
        let paper = [0.1, 0.3, 0.5, 0.7, 0.9];
        assert_eq!(grid(&paper, &paper).unwrap().len(), 26);
        assert!(grid(&[1.5], &[0.1]).is_err() && grid(&[0.5], &[1.0]).is_err());
    }

    #[test]
    fn a_gain_beyond_its_standard_error_is_taken() {
        // d = best - alone = (.5, .5, .5, 0): mean .375, sd .25, se .125.
        let cells = choose(&trial(&[&[0.0, 0.5, 0.0, 0.2], &[0.5, 1.0, 0.5, 0.2]]), Rule::OneStandardError);
        assert!((cells[0].difference - 0.375).abs() < 1e-12);
        assert!((cells[0].se.unwrap() - 0.125).abs() < 1e-12);
        assert_eq!(chosen(&cells), (0.1, 0.1));
        assert!(cells[1].best && cells[1].difference == 0.0);
    }

    #[test]
    fn a_gain_within_its_standard_error_is_left() {
        // d = (1, -1, .5, 0): mean .125, sd = sqrt(2.1875 / 3) = .8539, se .4270.
        let t = trial(&[&[0.0, 1.0, 0.0, 0.2], &[1.0, 0.0, 0.5, 0.2]]);
        let cells = choose(&t, Rule::OneStandardError);
        assert!((cells[0].se.unwrap() - 0.42695628).abs() < 1e-8);
        assert_eq!(chosen(&cells), (0.0, 0.0));
        assert_eq!(chosen(&choose(&t, Rule::HighestMean)), (0.1, 0.1));
    }

    #[test]
    fn the_error_is_of_the_paired_difference() {
        // Users differ widely, the cells do so a little and always the same way: an unpaired
        // error (.2 and more) would hide it.
        let alone = [0.0, 1.0, 0.0, 1.0, 0.5];
        let better = [0.05, 1.0, 0.06, 1.0, 0.55];
        let cells = choose(&trial(&[&alone, &better]), Rule::OneStandardError);
        assert_eq!(chosen(&cells), (0.1, 0.1));
    }

    #[test]
    fn the_smallest_of_several_good_cells_is_taken() {
        let alone = [0.0, 0.0, 0.0, 0.1];
        let good = [0.5, 0.5, 0.4, 0.1];
        let best = [0.4, 0.6, 0.5, 0.1];
        let cells = choose(&trial(&[&alone, &good, &best]), Rule::OneStandardError);
        assert!(cells[2].best);
        assert_eq!(chosen(&cells), (0.1, 0.1));
    }

    #[test]
    fn equal_cells_leave_the_recommender_alone() {
        let same: &[f64] = &[0.3, 0.0, 1.0];
        let cells = choose(&trial(&[same, same, same]), Rule::HighestMean);
        assert_eq!(chosen(&cells), (0.0, 0.0));
        assert!(cells[0].best);
    }

    #[test]
    fn below_two_users_nothing_speaks_for_the_llm() {
        for rule in [Rule::OneStandardError, Rule::HighestMean] {
            assert_eq!(chosen(&choose(&trial(&[&[0.0], &[1.0]]), rule)), (0.0, 0.0));
            let none = choose(&trial(&[&[], &[]]), rule);
            assert_eq!(chosen(&none), (0.0, 0.0));
            assert!(none.iter().all(|c| c.se.is_none() && c.mean == 0.0));
        }
    }

    fn calibration() -> Calibration {
        Calibration {
            version: FORMAT,
            mode: "label".to_owned(),
            a1: 0.3,
            a2: 0.1,
            c: 1.0,
            l_min: 0.7,
            l_max: 6.5,
            metric: METRIC.to_owned(),
            rule: "one-standard-error".to_owned(),
            n_users: 200,
            mean: 0.08,
            recommender_mean: 0.07,
            se: Some(0.01),
            recommender_se: None,
            best: BestCell { a1: 0.5, a2: 0.1, mean: 0.081 },
            recommender: Some(FittedAs {
                model: "lightgcn".to_owned(),
                hyper: serde_json::json!({ "layers": 2 }),
                epochs: Some(40),
                metrics: BTreeMap::from([("valid_ndcg_10".to_owned(), 0.06)]),
                sha256: "ab".to_owned(),
            }),
            made: None,
        }
    }

    #[test]
    fn a_calibration_goes_to_json_and_back() {
        let c = calibration();
        assert_eq!(Calibration::from_bytes(&c.to_bytes().unwrap()).unwrap(), c);
    }

    #[test]
    fn a_calibration_of_an_earlier_version_is_still_read() {
        let mut json: serde_json::Value = serde_json::from_slice(&calibration().to_bytes().unwrap()).unwrap();
        for key in ["se", "recommender_se", "recommender"] {
            json.as_object_mut().unwrap().remove(key);
        }
        let read = Calibration::from_bytes(json.to_string().as_bytes()).unwrap();
        assert_eq!((read.a1, read.se, read.recommender), (0.3, None, None));
    }

    #[test]
    fn a_damaged_calibration_is_refused() {
        let text = String::from_utf8(calibration().to_bytes().unwrap().to_vec()).unwrap();
        for (from, to, word) in [
            ("{", "[", "not a calibration"),
            ("\"version\": 1", "\"version\": 9", "format 9"),
            ("\"a1\": 0.3", "\"a1\": 1.3", "out of range"),
            ("\"l_max\": 6.5", "\"l_max\": 0.5", "out of range"),
            ("\"c\": 1.0", "\"c\": 0.0", "out of range"),
        ] {
            assert!(text.contains(from), "{text}");
            let e = Calibration::from_bytes(text.replacen(from, to, 1).as_bytes()).unwrap_err();
            assert!(e.to_string().contains(word), "{e}");
            assert_eq!(e.fault.exit_code(), 65);
        }
    }
}
