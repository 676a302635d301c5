//! The fits of a search, in order, each kept when it ends.
//!
//! In: settings, tables. Out: what every fit came to, the best setting, its figures on test.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::report;
use crate::device::{Device, DeviceChoice};
use crate::error::{Error, Result};
use crate::recommenders::Backbone;
use crate::stages::context::{Cancel, Observer, StageResult};
use crate::stages::train::data::{FitOn, Log, Tables, TrainData};
use crate::stages::train::fit::{Fitter, fault_of_setting, valid_metric};
use crate::stages::train::hyper_from::Best;
use crate::stages::train::measure::{Figure, SideTables, Test, figures_from_json, figures_to_json};
use crate::stages::train::progress::FitProgress;
use crate::stages::train::savings::{Savings, key_of};
use crate::stages::train::{FieldsConfig, read_data};
use crate::tables::Table;

/// Cut-offs of the figures on test.
const KS: [usize; 3] = [3, 5, 10];
/// Folder of the kept fits in the savings.
const KEPT: &str = "fits";

/// A setting of the hyper-parameters.
#[derive(Clone, Debug)]
pub(super) struct Setting {
    /// What was drawn.
    pub drawn: Value,
    /// All of them.
    pub hyper: Value,
}

/// The figures on test.
pub(super) struct Confirm {
    pub test: Table,
    pub history: Option<Table>,
    pub seeds: u32,
    pub refit: bool,
    pub history_at_test: String,
}

/// What goes to the worker thread.
pub(super) struct Work {
    pub backbone: &'static Backbone,
    pub settings: Vec<Setting>,
    /// There is nothing to choose from: the first fit is measured on test at once.
    pub only_one: bool,
    pub seeds: u32,
    pub fields: Option<FieldsConfig>,
    pub confirm: Option<Confirm>,
    pub device: DeviceChoice,
    pub seed: u64,
    pub savings: Option<(Savings, Duration)>,
    pub observer: Arc<dyn Observer>,
    pub cancel: Cancel,
}

/// What a fit came to.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Outcome {
    /// `ok`, `diverged` or `failed`.
    pub status: String,
    /// Why it is not `ok`.
    pub message: Option<String>,
    /// The validation metric of the best epoch, as it is told (RMSE without a sign).
    pub valid: Option<f64>,
    pub best_epoch: usize,
    pub epochs: usize,
    pub seconds: f64,
    /// What the weights that were measured on test were fitted on.
    pub weights_fit_on: String,
    /// Figures on test, where they were asked for.
    pub test: Vec<Figure>,
}

/// One fit of the search.
pub(super) struct Trial {
    /// 0-based place of the setting.
    pub setting: usize,
    pub seed: u64,
    pub outcome: Outcome,
}

/// A search at work.
struct Running<'a> {
    work: &'a Work,
    data: TrainData,
    test: Option<(Test, String)>,
    device: Device,
    kept: usize,
    fits: usize,
    seconds: f64,
}

impl Work {
    /// Seed of the fit number `n` (0-based) of a setting: SQL and TOML integers hold it.
    fn seed_of(&self, n: u32) -> u64 {
        self.seed.wrapping_add(u64::from(n)) & (u64::MAX >> 1)
    }

    /// All trials, the choice, the figures on test.
    pub fn run(&self, tables: &Tables) -> Result<StageResult> {
        let data = read_data(self.backbone.task, tables, self.fields.as_ref())?;
        if !data.has_valid() && self.settings.len() > 1 {
            return Err(Error::data(
                "input `valid` has no row that can be measured, so that trials cannot be compared",
            )
            .with_help("its users must have train interactions"));
        }
        let test = self.test(&data, tables)?;
        let opened = self.device.open()?;
        self.observer.note(&opened.why);
        let confirm_fits = self.confirm.as_ref().map_or(0, |c| c.seeds) as u64;
        self.observer.begin("fits", self.settings.len() as u64 * u64::from(self.seeds) + confirm_fits);
        let mut running = Running { work: self, data, test, device: opened.device, kept: 0, fits: 0, seconds: 0.0 };

        let (metric, _) = valid_metric(self.backbone.task);
        let mut trials: Vec<Trial> = Vec::new();
        for (setting, given) in self.settings.iter().enumerate() {
            for n in 0..self.seeds {
                let so_far = match self.best(&trials) {
                    Some((best, Some(valid))) => format!(", best so far {metric} {valid:.4} in trial {}", best + 1),
                    _ => String::new(),
                };
                let of = self.settings.len();
                let seeds = if self.seeds > 1 { format!(", seed {} of {}", n + 1, self.seeds) } else { String::new() };
                let before = format!("trial {} of {of}{seeds}{so_far}: ", setting + 1);
                let seed = self.seed_of(n);
                let outcome = running.fit(given, seed, self.only_one, before)?;
                if outcome.status != "ok" {
                    let why = outcome.message.as_deref().unwrap_or_default();
                    self.observer.note(&format!("trial {} {}: {why}", setting + 1, outcome.status));
                }
                trials.push(Trial { setting, seed, outcome });
                self.observer.advance(1);
            }
        }
        let Some((chosen, valid)) = self.best(&trials) else {
            let first = trials.iter().find_map(|t| t.outcome.message.clone()).unwrap_or_default();
            return Err(Error::spec(format!("no trial of {} ended well; the first one: {first}", self.settings.len()))
                .with_help("narrow `space`: a lower learning rate is the first thing to try"));
        };
        let told = valid.map_or_else(String::new, |valid| format!(": validation {metric} {valid:.4}"));
        let best = &self.settings[chosen];
        self.observer.note(&format!(
            "trial {} of {} is the best{told}, with {}",
            chosen + 1,
            self.settings.len(),
            best.drawn
        ));

        let mut confirmed: Vec<Trial> = Vec::new();
        for n in 0..confirm_fits as u32 {
            let before = format!("test of trial {}, seed {} of {confirm_fits}: ", chosen + 1, n + 1);
            let seed = self.seed_of(n);
            let outcome = running.fit(best, seed, true, before)?;
            if outcome.status != "ok" {
                let why = outcome.message.unwrap_or_default();
                return Err(Error::spec(format!("the best setting {} with seed {seed}: {why}", outcome.status))
                    .with_help("give the search more `seeds`, so that a setting that fails for some is not chosen"));
            }
            confirmed.push(Trial { setting: chosen, seed, outcome });
            self.observer.advance(1);
        }
        let artifact = Best {
            model: self.backbone.name.to_owned(),
            hyper: best.hyper.clone(),
            trial: chosen + 1,
            metric: metric.to_owned(),
            valid,
        };
        let mut result = StageResult::default()
            .with_table("trials", report::trials_table(metric, &self.settings, &trials, chosen)?)
            .with_artifact("best", artifact.artifact()?);
        if let Some(confirm) = &self.confirm {
            let table = report::confirmed_table(metric, &confirm.history_at_test, &confirmed)?;
            result = result.with_table("confirmed", table);
        }
        let diverged = trials.iter().filter(|t| t.outcome.status != "ok").count();
        Ok(result
            .with_counter("trials", self.settings.len())
            .with_counter("fits", running.fits)
            .with_counter("fits_kept", running.kept)
            .with_counter("diverged", diverged)
            .with_counter("best_trial", chosen + 1)
            .with_counter("best_valid", json!(valid))
            .with_counter("seconds", (running.seconds * 1000.0).round() / 1000.0))
    }

    /// The held-out test data with a digest of it.
    fn test(&self, data: &TrainData, tables: &Tables) -> Result<Option<(Test, String)>> {
        let Some(confirm) = &self.confirm else { return Ok(None) };
        let test = match (&data.log, &confirm.history) {
            (Log::Ranking(_), Some(history)) => Test::ranking(data, &confirm.test, history)?,
            (Log::Ranking(_), None) => return Err(Error::internal("`test` without `history` was let through")),
            (Log::Rating(log), _) => {
                let config = self.fields.clone().unwrap_or_default();
                let side = SideTables { config: &config, users: tables.users.as_ref(), items: tables.items.as_ref() };
                Test::rating(data, &log.fields, &side, &confirm.test)?
            }
        };
        let key = key_of(&json!([test.fingerprint(), KS, confirm.refit]));
        Ok(Some((test, key)))
    }

    /// The trial with the best mean over its seeds, and that mean; of equal ones the first. A trial with a fit that
    /// did not end well does not count.
    fn best(&self, trials: &[Trial]) -> Option<(usize, Option<f64>)> {
        let (_, sign) = valid_metric(self.backbone.task);
        let mut best: Option<(usize, Option<f64>)> = None;
        for of_one in trials.chunks(self.seeds as usize) {
            if of_one.len() < self.seeds as usize || of_one.iter().any(|t| t.outcome.status != "ok") {
                continue;
            }
            let values: Option<Vec<f64>> = of_one.iter().map(|t| t.outcome.valid).collect();
            let mean = values.map(|v| v.iter().sum::<f64>() / v.len() as f64);
            let better = match (best, mean) {
                (None, _) => true,
                (Some((_, Some(old))), Some(new)) => new * sign > old * sign,
                (Some((_, None)), Some(_)) => true,
                (Some(_), None) => false,
            };
            if better {
                best = Some((of_one[0].setting, mean));
            }
        }
        best
    }
}

impl Running<'_> {
    /// Fits, or takes what was kept of the same fit. With `on_test`, the outcome has figures on test.
    fn fit(&mut self, setting: &Setting, seed: u64, on_test: bool, before: String) -> Result<Outcome> {
        self.work.cancel.check()?;
        let work = self.work;
        let task = work.backbone.task;
        let metric = valid_metric(task);
        let watch = FitProgress::of_many(work.observer.clone(), work.cancel.clone(), metric, before);
        let savings = work.savings.as_ref().map(|(savings, every)| (savings, *every));
        let fitter = Fitter { backbone: work.backbone, device: &self.device, watch: &watch, savings, warm: None };
        let test = self.test.as_ref().filter(|_| on_test);
        let key = fitter.key(&setting.hyper, seed, &self.data, FitOn::Train);
        self.fits += 1;
        if let Some((savings, _)) = savings
            && let Some(kept) = savings.kept(KEPT, &key)?
            && let Some(outcome) = from_json(&kept, test.map(|(_, key)| key.as_str()))
        {
            self.kept += 1;
            return Ok(outcome);
        }
        let refit = test.is_some() && work.confirm.as_ref().is_some_and(|c| c.refit);
        let began = Instant::now();
        let outcome = match fitter.fit(&setting.hyper, seed, &self.data, refit) {
            Ok(fitted) => Outcome {
                status: "ok".to_owned(),
                message: None,
                valid: fitted.quality.map(|quality| quality * metric.1),
                best_epoch: fitted.best_epoch,
                epochs: fitted.epochs.len(),
                seconds: began.elapsed().as_secs_f64(),
                weights_fit_on: fitted.fit_on.as_str().to_owned(),
                test: match test {
                    Some((test, _)) => test.figures(&fitted.model, &KS)?,
                    None => Vec::new(),
                },
            },
            Err(error) => match fault_of_setting(&error) {
                None => return Err(error),
                Some(status) => Outcome {
                    status: status.to_owned(),
                    message: Some(error.message.clone()),
                    seconds: began.elapsed().as_secs_f64(),
                    weights_fit_on: FitOn::Train.as_str().to_owned(),
                    ..Outcome::default()
                },
            },
        };
        self.seconds += outcome.seconds;
        if let Some((savings, _)) = savings {
            savings.keep(KEPT, &key, &to_json(&outcome, test.map(|(_, key)| key.as_str())))?;
        }
        Ok(outcome)
    }
}

/// Numbers are kept as bits, so that a search that was stopped writes the same table as one that was not.
fn to_json(outcome: &Outcome, test_key: Option<&str>) -> Value {
    json!({
        "status": outcome.status,
        "message": outcome.message,
        "valid": outcome.valid,
        "valid_bits": outcome.valid.map(f64::to_bits),
        "best_epoch": outcome.best_epoch,
        "epochs": outcome.epochs,
        "seconds_bits": outcome.seconds.to_bits(),
        "weights_fit_on": outcome.weights_fit_on,
        "test_key": test_key,
        "test": figures_to_json(&outcome.test),
    })
}

/// A kept outcome, where it has all that is asked for.
fn from_json(kept: &Value, test_key: Option<&str>) -> Option<Outcome> {
    let status = kept["status"].as_str()?.to_owned();
    if status == "ok" && test_key.is_some() && kept["test_key"].as_str() != test_key {
        return None;
    }
    let bits = |value: &Value| value.as_u64().map(f64::from_bits);
    Some(Outcome {
        status,
        message: kept["message"].as_str().map(str::to_owned),
        valid: bits(&kept["valid_bits"]),
        best_epoch: kept["best_epoch"].as_u64()? as usize,
        epochs: kept["epochs"].as_u64()? as usize,
        seconds: bits(&kept["seconds_bits"])?,
        weights_fit_on: kept["weights_fit_on"].as_str()?.to_owned(),
        test: figures_from_json(&kept["test"])?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_outcome_is_the_same_to_the_bit() {
        let outcome = Outcome {
            status: "ok".to_owned(),
            valid: Some(0.1 + 0.2),
            best_epoch: 3,
            epochs: 7,
            seconds: 1.0 / 3.0,
            weights_fit_on: "train".to_owned(),
            test: vec![Figure { metric: "Hit@3".to_owned(), k: Some(3), value: 1.0 / 7.0, n: 9 }],
            ..Outcome::default()
        };
        let text = to_json(&outcome, Some("t")).to_string();
        let kept: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(from_json(&kept, Some("t")), Some(outcome.clone()));
        assert_eq!(from_json(&kept, None), Some(outcome));
        assert_eq!(from_json(&kept, Some("another")), None, "figures of other test data do not count");
        assert_eq!(from_json(&json!({"status": "ok"}), None), None);
    }
}
