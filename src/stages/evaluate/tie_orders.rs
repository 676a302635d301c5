//! How far the figures depend on the order of interactions of equal time.
//!
//! In: the interactions, the fitted model. Out: [`EVALUATION_TIES`]. For each draw the interactions of equal time are
//! put in a random order, split anew by leave-one-out, the same model fitted again (same hyper-parameters and seed,
//! as many epochs as its card says, without validation) and ranked. So is the file order once more, since a fit of so
//! many epochs is not the one that was stopped there: a step size that falls with the epochs falls faster. Every draw
//! that has ended is kept.

use std::sync::Arc;
use std::time::Instant;

use arrow::array::{ArrayRef, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::columns::ROW_ID;
use crate::device::DeviceChoice;
use crate::error::{Error, Result};
use crate::interactions::clean::{Ordered, clean};
use crate::interactions::split::{HistoryAtTest, Method, Part, SplitRule, split};
use crate::interactions::{Histories, IdMap};
use crate::recommenders::saved::{ModelCard, TrainedModel};
use crate::recommenders::{Task, registry};
use crate::stages::context::{Artifact, Cancel, Observer};
use crate::stages::train::data::{Log, RankingLog, TrainData};
use crate::stages::train::fit::{FittedModel, Fitter, valid_metric};
use crate::stages::train::measure::{Case, Figure, Test, figures_from_json, figures_to_json};
use crate::stages::train::outputs::fit_on_of;
use crate::stages::train::progress::FitProgress;
use crate::stages::train::savings::{Savings, key_of};
use crate::tables::Table;
use crate::tables::schemas::EVALUATION_TIES;

/// The spread of the recommender's figures over random orders of interactions of equal time.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TieOrders {
    /// The interactions that the `split` stage read: `user_id`, `item_id`, `row_id`, `timestamp`.
    pub interactions: String,
    /// Number of random orders; each one costs a fit.
    #[serde(default = "default_draws")]
    #[schemars(range(min = 1, max = 1000))]
    pub draws: u32,
    /// As in the `split` stage.
    #[serde(default = "default_min_interactions")]
    #[schemars(range(min = 3))]
    pub min_interactions: usize,
}

fn default_draws() -> u32 {
    8
}
fn default_min_interactions() -> usize {
    3
}

/// What goes to the worker thread.
pub(super) struct Work {
    pub draws: u32,
    pub ks: Vec<usize>,
    pub rule: SplitRule,
    pub device: DeviceChoice,
    pub seed: u64,
    pub savings: Option<Savings>,
    pub observer: Arc<dyn Observer>,
    pub cancel: Cancel,
}

/// The rule of the draws.
pub(super) fn rule(config: &TieOrders, history_at_test: &str) -> Result<SplitRule> {
    Ok(SplitRule {
        method: Method::LeaveOneOut,
        min_interactions: config.min_interactions,
        history_at_test: HistoryAtTest::parse(history_at_test)?,
    })
}

/// One split in the indices of the model.
struct Drawn {
    data: TrainData,
    test: Test,
}

impl Work {
    /// The table, and the number of draws that were kept from an earlier run.
    pub fn run(&self, interactions: &Table, artifact: &Artifact, history_at_test: &str) -> Result<(Table, usize)> {
        let card = crate::recommenders::saved::read_card(&artifact.files).map_err(|e| e.at("input `model`"))?;
        let backbone = registry::find_saved(&card.model)?;
        if backbone.task == Task::Rating {
            return Err(Error::spec(format!(
                "`tie_orders` is for models that rank items, and `{}` does not",
                card.model
            )));
        }
        let TrainedModel { users, items, scorer, .. } =
            TrainedModel::from_files(&artifact.files).map_err(|e| e.at("input `model`"))?;
        let as_it_is = FittedModel::Scorer(scorer);
        let own = self.drawn(interactions, (&users, &items))?;
        if own.data.users.len() != users.len() || own.data.items.len() != items.len() {
            return Err(Error::data("`interactions` of `tie_orders` has users or items that the model does not know")
                .with_help("name the table that the `split` stage before the model read"));
        }
        let file_order = own.test.figures(&as_it_is, &self.ks)?;
        let opened = self.device.open()?;
        self.observer.begin("tie orders", u64::from(self.draws) + 1);
        let mut kept = 0;
        let mut fit = |drawn: &Drawn, before: String| {
            self.cancel.check()?;
            let metric = valid_metric(backbone.task);
            let watch = FitProgress::of_many(self.observer.clone(), self.cancel.clone(), metric, before);
            let fitter = Fitter { backbone, device: &opened.device, watch: &watch, savings: None, warm: None };
            let figures = self.figures(&fitter, &card, drawn, &mut kept)?;
            self.observer.advance(1);
            Ok::<_, Error>(figures)
        };
        let refit = fit(&own, "file order: ".to_owned())?;
        let mut draws: Vec<Vec<Figure>> = Vec::new();
        for draw in 0..self.draws {
            let drawn = self.drawn(&shuffled(interactions, self.seed, draw)?, (&users, &items))?;
            draws.push(fit(&drawn, format!("order {} of {}: ", draw + 1, self.draws))?);
        }
        let said = (history_at_test, card.weights_fit_on.as_str());
        Ok((table(&file_order, &refit, &draws, said)?, kept))
    }

    fn figures(&self, fitter: &Fitter<'_>, card: &ModelCard, drawn: &Drawn, kept: &mut usize) -> Result<Vec<Figure>> {
        /// Folder of the kept draws in the savings.
        const KEPT: &str = "ties";
        let on = fit_on_of(card);
        let key = key_of(&json!([
            fitter.key(&card.hyper, card.seed, &drawn.data, on),
            card.best_epoch,
            drawn.test.fingerprint(),
            self.ks,
        ]));
        if let Some(savings) = &self.savings
            && let Some(figures) = savings.kept(KEPT, &key)?.and_then(|kept| figures_from_json(&kept["figures"]))
        {
            *kept += 1;
            return Ok(figures);
        }
        let began = Instant::now();
        let fitted = fitter.fit_for(&card.hyper, card.seed, &drawn.data, on, card.best_epoch)?;
        let figures = drawn.test.figures(&fitted.model, &self.ks)?;
        if let Some(savings) = &self.savings {
            let document = json!({
                "model": card.model, "seconds": began.elapsed().as_secs_f64(), "figures": figures_to_json(&figures),
            });
            savings.keep(KEPT, &key, &document)?;
        }
        Ok(figures)
    }

    /// Splits a table; users and items have the indices of the model, then those that it does not know.
    fn drawn(&self, interactions: &Table, (users, items): (&IdMap, &IdMap)) -> Result<Drawn> {
        let ordered = clean(interactions, self.seed).map_err(|e| e.at("input `tie_orders.interactions`"))?;
        let split = split(&ordered, &self.rule)?;
        let users = IdMap::new(&[users.ids(), ordered.user_map.ids()])?;
        let items = IdMap::new(&[items.ids(), ordered.item_map.ids()])?;
        let pairs = pairs(&ordered, &users, &items)?;
        let of = |keep: &dyn Fn(usize) -> bool| -> Vec<(u32, u32)> {
            (0..pairs.len()).filter(|&n| keep(n)).map(|n| pairs[n]).collect()
        };
        let histories = |pairs: &[(u32, u32)]| Histories::from_pairs(users.len(), pairs);
        let history = histories(&of(&|n| split.in_history[n]));
        let held_out = of(&|n| split.parts[n] == Part::Test);
        let case = |&(user, item): &(u32, u32)| {
            let known = !history.of(user as usize).is_empty();
            Case { user: known.then_some(user), items: vec![item], held_out: 1 }
        };
        let cases = held_out.iter().map(case).collect();
        let log = Log::Ranking(RankingLog {
            train: histories(&of(&|n| split.parts[n] == Part::Train)),
            both: histories(&of(&|n| matches!(split.parts[n], Part::Train | Part::Valid))),
            valid: Vec::new(),
            cold: 0,
        });
        Ok(Drawn { data: TrainData { users, items, log }, test: Test::Ranking { history, cases } })
    }
}

/// `(user, item)` of the ordered rows.
fn pairs(ordered: &Ordered, users: &IdMap, items: &IdMap) -> Result<Vec<(u32, u32)>> {
    let index = |own: &IdMap, all: &IdMap| -> Vec<Option<u32>> { all.encode(own.ids()) };
    let (users, items) = (index(&ordered.user_map, users), index(&ordered.item_map, items));
    ordered
        .users
        .iter()
        .zip(&ordered.items)
        .map(|(&u, &i)| {
            let pair = users[u as usize].zip(items[i as usize]);
            pair.ok_or_else(|| Error::internal("an id is missing from a map that was made of it"))
        })
        .collect()
}

/// The same table with the numbers of its rows in a random order: `row_id` decides between equal times.
fn shuffled(table: &Table, seed: u64, draw: u32) -> Result<Table> {
    let batch = table.to_batch()?;
    let mut row_ids = table.i64s(ROW_ID)?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(u64::from(draw));
    row_ids.shuffle(&mut rng);
    let place = batch.schema().index_of(ROW_ID)?;
    let mut fields: Vec<Arc<Field>> = batch.schema().fields().iter().cloned().collect();
    fields[place] = Arc::new(Field::new(ROW_ID, DataType::Int64, false));
    let mut columns = batch.columns().to_vec();
    columns[place] = Arc::new(Int64Array::from(row_ids));
    Ok(Table::from_batch(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?))
}

fn table(
    file_order: &[Figure],
    refit: &[Figure],
    draws: &[Vec<Figure>],
    (history_at_test, fit_on): (&str, &str),
) -> Result<Table> {
    let of = |n: usize| -> Vec<f64> { draws.iter().map(|figures| figures[n].value).collect() };
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let sd = |v: &[f64]| {
        let (mean, n) = (mean(v), v.len());
        (n > 1).then(|| (v.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1) as f64).sqrt())
    };
    let each = |f: &dyn Fn(&[f64]) -> Option<f64>| -> ArrayRef {
        Arc::new((0..file_order.len()).map(|n| f(&of(n))).collect::<Float64Array>())
    };
    let same = |text: &str| -> ArrayRef { Arc::new(StringArray::from(vec![text; file_order.len()])) };
    let arrays: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(file_order.iter().map(|f| &f.metric))),
        Arc::new(file_order.iter().map(|f| f.k.map(|k| k as i32)).collect::<Int32Array>()),
        Arc::new(Float64Array::from_iter_values(file_order.iter().map(|f| f.value))),
        Arc::new(Float64Array::from_iter_values(refit.iter().map(|f| f.value))),
        each(&|v| Some(mean(v))),
        each(&sd),
        each(&|v| v.iter().copied().reduce(f64::min)),
        each(&|v| v.iter().copied().reduce(f64::max)),
        Arc::new(Int32Array::from(vec![draws.len() as i32; file_order.len()])),
        Arc::new(Int64Array::from_iter_values(file_order.iter().map(|f| f.n as i64))),
        same(history_at_test),
        same(fit_on),
    ];
    EVALUATION_TIES.table(&DataType::Utf8, &DataType::Utf8, arrays)
}
