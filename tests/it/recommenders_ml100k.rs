//! MovieLens-100K without a pipeline: five seeds of two backbones are above the paper's bases. Run by hand:
//!
//! ```text
//! TAILFUSE_ML100K=ml-100k.inter cargo test --release --test it -- --ignored --nocapture ml100k
//! ```
//!
//! `ml-100k.inter` is RecBole's file (user, item, rating, timestamp, tab-separated, one header line), as the
//! catalogue fetches it. Leave-one-out by time, ties in file order; weights fitted on train; ranked are all
//! 1,682 items minus the user's train and validation items.

use serde_json::json;
use tailfuse::device::DeviceChoice;
use tailfuse::eval::metrics::{hit_at, ndcg_at};
use tailfuse::interactions::{Histories, IdMap};
use tailfuse::recommenders::{FitContext, Interactions, Unwatched, registry, topk};
use tailfuse::tables::{Id, IdColumn};

struct Split {
    n_users: usize,
    n_items: usize,
    train: Histories,
    /// Train and validation items: what is known at test time.
    known: Histories,
    valid: Vec<(u32, u32)>,
    test: Vec<(u32, u32)>,
}

fn ml100k() -> Split {
    let path = std::env::var("TAILFUSE_ML100K").expect("set TAILFUSE_ML100K to the path of ml-100k.inter");
    let text = fs_err::read_to_string(path).unwrap();
    let mut rows: Vec<(i64, i64, f64)> = text
        .lines()
        .skip(1)
        .map(|line| {
            let fields: Vec<&str> = line.split('\t').collect();
            (fields[0].parse().unwrap(), fields[1].parse().unwrap(), fields[3].parse().unwrap())
        })
        .collect();
    assert_eq!(rows.len(), 100_000);
    rows.sort_by(|a, b| a.0.cmp(&b.0).then(a.2.total_cmp(&b.2))); // stable: ties keep the file's order
    let users = IdMap::new(&[&IdColumn::Int(rows.iter().map(|r| r.0).collect())]).unwrap();
    let items = IdMap::new(&[&IdColumn::Int(rows.iter().map(|r| r.1).collect())]).unwrap();
    let index = |r: &(i64, i64, f64)| (users.get(&Id::Int(r.0)).unwrap(), items.get(&Id::Int(r.1)).unwrap());
    let (mut train, mut known, mut valid, mut test) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for history in rows.chunk_by(|a, b| a.0 == b.0) {
        let pairs: Vec<(u32, u32)> = history.iter().map(index).collect();
        let n = pairs.len();
        train.extend(&pairs[..n - 2]);
        known.extend(&pairs[..n - 1]);
        valid.push(pairs[n - 2]);
        test.push(pairs[n - 1]);
    }
    assert_eq!((users.len(), items.len(), train.len(), test.len()), (943, 1682, 98_114, 943));
    let of = |pairs: &[(u32, u32)]| Histories::from_pairs(users.len(), pairs);
    Split { n_users: 943, n_items: 1682, train: of(&train), known: of(&known), valid, test }
}

impl Split {
    fn data(&self) -> Interactions<'_> {
        Interactions { n_users: self.n_users, n_items: self.n_items, train: &self.train, valid: &self.valid }
    }
}

/// User and system seconds of this process.
fn cpu_seconds() -> f64 {
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 * 1e-6;
    // SAFETY: `usage` is plain data that the call fills in.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_SELF, &mut usage), 0);
        seconds(usage.ru_utime) + seconds(usage.ru_stime)
    }
}

fn mean_and_sd(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    (mean, (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt())
}

/// Not in every run of the tests: ten fits of minutes, whose figures are in docs/experiments.md. By hand:
/// `TAILFUSE_ML100K=ml-100k.inter cargo test --release --test it ml100k_five_seeds -- --ignored --nocapture`.
#[test]
#[ignore = "minutes; needs TAILFUSE_ML100K"]
fn ml100k_five_seeds() {
    let split = ml100k();
    let device = DeviceChoice::Cpu.open().unwrap().device;
    type Metric = (&'static str, fn(Option<usize>) -> f64);
    let metrics: [Metric; 5] = [
        ("Hit@3", |r| hit_at(r, 3)),
        ("NDCG@3", |r| ndcg_at(r, 3)),
        ("Hit@5", |r| hit_at(r, 5)),
        ("NDCG@5", |r| ndcg_at(r, 5)),
        ("NDCG@10", |r| ndcg_at(r, 10)),
    ];
    // The paper's base, arXiv 2401.13870: Hit@3.
    for (model, floor) in [("mf", 0.0455), ("lightgcn", 0.0492)] {
        let mut columns = vec![Vec::new(); metrics.len()];
        let mut valid = Vec::new();
        for seed in 1..=5 {
            let (wall, cpu) = (std::time::Instant::now(), cpu_seconds());
            let recommender = registry::find(model).unwrap().recommender(&json!({})).unwrap();
            let fit = recommender
                .fit(
                    &split.data(),
                    &FitContext { seed, device: &device, watch: &Unwatched, checkpoints: None, warm: None },
                )
                .unwrap();
            let (wall, cpu) = (wall.elapsed().as_secs_f64(), cpu_seconds() - cpu);
            let informed = fit.scorer.with_history(&split.known);
            let scorer = informed.as_deref().unwrap_or(fit.scorer.as_ref());
            let ranks = topk::ranks(scorer, &split.test, &split.known, &split.known);
            for (column, (_, metric)) in columns.iter_mut().zip(&metrics) {
                column.push(ranks.iter().map(|&r| metric(r)).sum::<f64>() / ranks.len() as f64);
            }
            valid.push(fit.epochs.iter().filter_map(|e| e.valid).fold(0.0, f64::max));
            eprintln!(
                "{model} seed {seed}: epoch {} of {}, validation NDCG@10 {:.4}, test Hit@3 {:.4}, {wall:.1} s, {cpu:.1} CPU s",
                fit.best_epoch,
                fit.epochs.len(),
                valid.last().unwrap(),
                columns[0].last().unwrap()
            );
        }
        for ((name, _), column) in metrics.iter().zip(&columns) {
            let (mean, sd) = mean_and_sd(column);
            eprintln!("{model} {name}: mean {mean:.4}, sd {sd:.4}");
        }
        let (mean, sd) = mean_and_sd(&valid);
        eprintln!("{model} validation NDCG@10: mean {mean:.4}, sd {sd:.4}");
        assert!(mean_and_sd(&columns[0]).0 >= floor, "{model}: mean Hit@3 below {floor}");
    }
}
