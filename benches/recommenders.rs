//! Speed and memory of the recommenders, one thing a process, for `peers/bench_recommenders.py` and
//! `peers/bench_scale.py`; by hand:
//!
//!     cargo bench --bench recommenders -- epochs MODEL JSON --data FOLDER [--epochs 3] [--seed 1]
//!     cargo bench --bench recommenders -- target MODEL JSON --data FOLDER --ndcg 0.113 [--epochs 200] [--seed 1]
//!     cargo bench --bench recommenders -- fit MODEL JSON --data FOLDER [--rounds 3] [--seed 1]
//!     cargo bench --bench recommenders -- top-k --users 943 --items 1682 --dim 64 --seen 104 [--k 20] [--rounds 5]
//!     cargo bench --bench recommenders -- scale MODEL JSON --interactions 1000000 [--epochs 1] [--seed 1]
//!
//! JSON holds hyper-parameters, `{}` for the defaults. FOLDER holds MovieLens 100K as RecBole writes it
//! (`ml-100k.inter`, for rating models also `.user` and `.item`). Train is leave-one-out by time, ties in file order.
//! Each form prints JSON lines, the last one with the peak resident memory.
//!
//! * `epochs`: seconds of each epoch without validation; building graphs and reading files is not counted.
//! * `target`: CPU seconds until NDCG@10 on validation is reached, validation included.
//! * `fit`: seconds of a whole fit without validation, and of scoring all items for all users; for closed forms.
//! * `top-k`: shortlists of all users out of random vectors; `--seen` random items of each are left out.
//! * `scale`: a synthetic log with four users to an item, both with a power law (50 interactions a user on average),
//!   made by seed in this process; seconds and bytes per interaction.
//!
//! `RAYON_NUM_THREADS` sets the number of threads.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value as Json, json};
use tailfuse::device::DeviceChoice;
use tailfuse::error::{Error, Result};
use tailfuse::eval::metrics::ndcg_at;
use tailfuse::interactions::fields::{Column, Entities, Field, FieldSet, Rows, Side};
use tailfuse::interactions::{Histories, IdMap};
use tailfuse::recommenders::embedding_scorer::EmbeddingScorer;
use tailfuse::recommenders::rating::Ratings;
use tailfuse::recommenders::{Epoch, FitContext, Interactions, Task, Unwatched, Watch, registry, topk};
use tailfuse::tables::{Id, IdColumn};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let options = Options(arguments);
    match options.0.first().map(String::as_str) {
        Some("epochs") => epochs(&options),
        Some("target") => target(&options),
        Some("fit") => whole_fit(&options),
        Some("top-k") => top_k(&options),
        Some("scale") => scale(&options),
        _ => println!("give `epochs`, `target`, `fit`, `top-k` or `scale` (see the head of benches/recommenders.rs)"),
    }
}

struct Options(Vec<String>);

impl Options {
    fn text(&self, name: &str) -> Option<&str> {
        self.0.iter().position(|a| a == name).and_then(|i| self.0.get(i + 1)).map(String::as_str)
    }
    fn number(&self, name: &str, default: usize) -> usize {
        self.text(name).map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name} {v} is not a number")))
    }
    fn data(&self) -> PathBuf {
        PathBuf::from(self.text("--data").expect("--data FOLDER is missing"))
    }
    fn model(&self) -> &str {
        self.0.get(1).expect("MODEL is missing")
    }
    /// The given hyper-parameters, with those in `fixed` replaced.
    fn hyper(&self, fixed: Json) -> Json {
        let mut hyper: Json = serde_json::from_str(self.0.get(2).map_or("{}", String::as_str)).expect("JSON is wrong");
        let fixed = fixed.as_object().unwrap().clone();
        hyper.as_object_mut().expect("hyper-parameters are an object").extend(fixed);
        hyper
    }
}

/// Hears of epochs, and stops after so many or at a quality.
struct Meter {
    epochs: usize,
    quality: f64,
    state: Mutex<State>,
}

struct State {
    done: bool,
    reached: bool,
    cpu: f64,
    seconds: f64,
    cpu_of_epochs: Vec<f64>,
    wall_of_epochs: Vec<f64>,
}

impl Meter {
    fn new(epochs: usize, quality: f64) -> Self {
        let state = State {
            done: false,
            reached: false,
            cpu: cpu_seconds(),
            seconds: 0.0,
            cpu_of_epochs: Vec::new(),
            wall_of_epochs: Vec::new(),
        };
        Meter { epochs, quality, state: Mutex::new(state) }
    }
}

impl Watch for Meter {
    fn begin(&self, _: usize) {
        self.state.lock().unwrap().cpu = cpu_seconds();
    }
    fn epoch(&self, epoch: &Epoch) {
        let mut state = self.state.lock().unwrap();
        let cpu = cpu_seconds();
        let spent = cpu - state.cpu;
        state.cpu = cpu;
        state.seconds += spent;
        state.cpu_of_epochs.push(spent);
        state.wall_of_epochs.push(epoch.seconds);
        state.reached = epoch.valid.is_some_and(|v| v >= self.quality);
        state.done = state.reached || epoch.number >= self.epochs;
        println!(
            "{}",
            json!({"epoch": epoch.number, "loss": epoch.loss, "valid": epoch.valid, "wall_s": epoch.seconds,
                   "cpu_s": spent, "total_cpu_s": state.seconds})
        );
    }
    fn check(&self) -> Result<()> {
        match self.state.lock().unwrap().done {
            true => Err(Error::internal("measured")),
            false => Ok(()),
        }
    }
}

/// Fits with `meter`; that it stopped the fit is no error.
fn fit(options: &Options, fixed: Json, data: &Interactions<'_>, meter: &Meter) {
    let device = DeviceChoice::Cpu.open().unwrap().device;
    let seed = options.number("--seed", 1) as u64;
    let context = FitContext { seed, device: &device, watch: meter, checkpoints: None, warm: None };
    let hyper = options.hyper(fixed);
    let model = registry::find(options.model()).and_then(|b| b.recommender(&hyper)).unwrap_or_else(|e| panic!("{e}"));
    if let Err(error) = model.fit(data, &context) {
        assert_eq!(error.message, "measured", "{error}");
    }
}

fn epochs(options: &Options) {
    let wanted = options.number("--epochs", 3);
    // One more than wanted is begun and stopped, so that nothing is validated or copied in the last one.
    let fixed = json!({"epochs": wanted + 1, "eval_every": 1000});
    let meter = Meter::new(wanted, f64::INFINITY);
    let log = Log::read(&options.data());
    let backbone = registry::find(options.model()).unwrap_or_else(|e| panic!("{e}"));
    if backbone.task == Task::Rating {
        log.with_ratings(&options.data(), |data| {
            let device = DeviceChoice::Cpu.open().unwrap().device;
            let seed = options.number("--seed", 1) as u64;
            let context = FitContext { seed, device: &device, watch: &meter, checkpoints: None, warm: None };
            let model = backbone.rating_recommender(&options.hyper(fixed)).unwrap_or_else(|e| panic!("{e}"));
            if let Err(error) = model.fit(data, &context) {
                assert_eq!(error.message, "measured", "{error}");
            }
        });
    } else {
        let (train, _) = log.histories();
        let data = Interactions { n_users: log.users.len(), n_items: log.items.len(), train: &train, valid: &[] };
        fit(options, fixed, &data, &meter);
    }
    finish(json!({"model": options.model(), "epoch_cpu_s": meter.state.lock().unwrap().cpu_of_epochs}));
}

fn target(options: &Options) {
    let wanted = options.number("--epochs", 200);
    let quality = options.text("--ndcg").map_or(0.113, |v| v.parse().expect("--ndcg is not a number"));
    let meter = Meter::new(wanted, quality);
    let log = Log::read(&options.data());
    let (train, valid) = log.histories();
    let data = Interactions { n_users: log.users.len(), n_items: log.items.len(), train: &train, valid: &valid };
    fit(options, json!({"epochs": wanted + 1, "eval_every": 1, "patience": 1000}), &data, &meter);
    let state = meter.state.lock().unwrap();
    finish(json!({"model": options.model(), "target": quality, "reached": state.reached,
                  "epochs": state.cpu_of_epochs.len(), "cpu_s": state.seconds}));
}

fn whole_fit(options: &Options) {
    let log = Log::read(&options.data());
    let (train, valid) = log.histories();
    let data = Interactions { n_users: log.users.len(), n_items: log.items.len(), train: &train, valid: &[] };
    let device = DeviceChoice::Cpu.open().unwrap().device;
    let seed = options.number("--seed", 1) as u64;
    let hyper = options.hyper(json!({}));
    let model = registry::find(options.model()).and_then(|b| b.recommender(&hyper)).unwrap_or_else(|e| panic!("{e}"));
    let (mut fits, mut scores) = (Vec::new(), Vec::new());
    for _ in 0..options.number("--rounds", 3) {
        let begun = cpu_seconds();
        let context = FitContext { seed, device: &device, watch: &Unwatched, checkpoints: None, warm: None };
        let fit = model.fit(&data, &context).unwrap_or_else(|e| panic!("{e}"));
        let fitted = cpu_seconds();
        let ranks = topk::ranks(fit.scorer.as_ref(), &valid, &train, &train);
        let ndcg = ranks.iter().map(|&rank| ndcg_at(rank, 10)).sum::<f64>() / ranks.len() as f64;
        fits.push(fitted - begun);
        scores.push(cpu_seconds() - fitted);
        println!("{}", json!({"fit_cpu_s": fits.last(), "score_cpu_s": scores.last(), "valid": ndcg}));
    }
    finish(json!({"model": options.model(), "fit_cpu_s": fits, "score_cpu_s": scores}));
}

fn top_k(options: &Options) {
    let (users, items) = (options.number("--users", 943), options.number("--items", 1682));
    let (dim, seen, k) = (options.number("--dim", 64), options.number("--seen", 104), options.number("--k", 20));
    let mut rng = ChaCha8Rng::seed_from_u64(options.number("--seed", 1) as u64);
    // Sums of uniform numbers are near enough to normal ones.
    let vectors: Vec<f32> =
        (0..(users + items) * dim).map(|_| (0..4).map(|_| rng.random::<f32>() - 0.5).sum()).collect();
    let pairs: Vec<(u32, u32)> = (0..users as u32)
        .flat_map(|u| (0..seen).map(move |_| u))
        .map(|u| (u, (rng.random::<f64>().powi(3) * items as f64) as u32))
        .collect();
    let seen = Histories::from_pairs(users, &pairs);
    let scorer = EmbeddingScorer::plain(users, items, dim, vectors);
    let everyone: Vec<u32> = (0..users as u32).collect();
    let mut runs = Vec::new();
    for _ in 0..options.number("--rounds", 5) {
        let (cpu, wall) = (cpu_seconds(), Instant::now());
        let lists = topk::top_k(&scorer, &everyone, &seen, k, &|_| Ok(())).unwrap();
        runs.push(cpu_seconds() - cpu);
        println!("{}", json!({"wall_s": wall.elapsed().as_secs_f64(), "cpu_s": runs.last(), "lists": lists.len()}));
    }
    finish(json!({"users": users, "items": items, "dim": dim, "k": k, "cpu_s": runs}));
}

fn scale(options: &Options) {
    let n = options.number("--interactions", 100_000);
    let (users, items) = ((n / 50).max(4), (n / 200).max(1));
    let train = synthetic(n, users, items, options.number("--seed", 1) as u64);
    let epochs = options.number("--epochs", 1);
    let meter = Meter::new(epochs, f64::INFINITY);
    let before = peak_rss();
    let data = Interactions { n_users: users, n_items: items, train: &train, valid: &[] };
    fit(options, json!({"epochs": epochs + 1, "eval_every": 1000}), &data, &meter);
    let state = meter.state.lock().unwrap();
    let median = |values: &[f64]| {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let n = train.n_interactions();
    finish(json!({
        "model": options.model(), "interactions": n, "users": users, "items": items,
        "epoch_wall_s": median(&state.wall_of_epochs), "epoch_cpu_s": median(&state.cpu_of_epochs),
        "cpu_us_per_interaction": median(&state.cpu_of_epochs) * 1e6 / n as f64,
        "log_rss_mib": before, "fit_bytes_per_interaction": (peak_rss() - before) * f64::from(1 << 20) / n as f64,
    }));
}

/// A log of about `n` interactions, each pair once: users' lengths fall with a power law from the first user on, and
/// items are drawn with probability proportional to `1 / (rank + 10)^0.8`.
fn synthetic(n: usize, users: usize, items: usize, seed: u64) -> Histories {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let shares: Vec<f64> = (0..users).map(|u| ((u + users / 20 + 1) as f64).powf(-0.7)).collect();
    let all: f64 = shares.iter().sum();
    let mut ends = Vec::with_capacity(items);
    let mut sum = 0.0;
    for rank in 0..items {
        sum += (rank as f64 + 10.0).powf(-0.8);
        ends.push(sum);
    }
    let mut pairs = Vec::with_capacity(n);
    let mut taken = vec![u32::MAX; items];
    let (mut reached, mut begun) = (0.0, 0);
    for (user, share) in shares.iter().enumerate() {
        reached += share / all * n as f64;
        let length = (reached.round() as usize - begun).clamp(3, items / 2 + 3);
        begun = reached.round() as usize;
        let mut found = 0;
        for _ in 0..4 * length {
            let at = rng.random::<f64>() * sum;
            let item = ends.partition_point(|&end| end < at).min(items - 1);
            if taken[item] != user as u32 {
                taken[item] = user as u32;
                pairs.push((user as u32, item as u32));
                found += 1;
                if found == length {
                    break;
                }
            }
        }
    }
    Histories::from_pairs(users, &pairs)
}

/// MovieLens 100K, users' rows in order of time.
struct Log {
    users: IdMap,
    items: IdMap,
    /// User, item, rating.
    rows: Vec<(u32, u32, f32)>,
}

/// User, item, rating and time as in the file.
type Row = (i64, i64, f32, f64);

impl Log {
    fn read(folder: &Path) -> Self {
        let mut rows: Vec<Row> = read(folder, "inter", |f| {
            (f[0].parse().unwrap(), f[1].parse().unwrap(), f[2].parse().unwrap(), f[3].parse().unwrap())
        });
        rows.sort_by(|a, b| a.0.cmp(&b.0).then(a.3.total_cmp(&b.3)));
        let ids = |of: &dyn Fn(&Row) -> i64| IdMap::new(&[&IdColumn::Int(rows.iter().map(of).collect())]).unwrap();
        let (users, items) = (ids(&|r| r.0), ids(&|r| r.1));
        let index = |map: &IdMap, id: i64| map.get(&Id::Int(id)).unwrap();
        let rows = rows.iter().map(|r| (index(&users, r.0), index(&items, r.1), r.2)).collect();
        Log { users, items, rows }
    }

    /// Train histories, and each user's last but one item.
    fn histories(&self) -> (Histories, Vec<(u32, u32)>) {
        let (mut train, mut valid) = (Vec::new(), Vec::new());
        for rows in self.rows.chunk_by(|a, b| a.0 == b.0) {
            let cut = rows.len().saturating_sub(2);
            train.extend(rows[..cut].iter().map(|r| (r.0, r.1)));
            valid.extend(rows[cut..].iter().take(1).map(|r| (r.0, r.1)));
        }
        (Histories::from_pairs(self.users.len(), &train), valid)
    }

    /// Train ratings with age, gender, occupation, year and genres.
    fn with_ratings(&self, folder: &Path, work: impl FnOnce(&Ratings<'_>)) {
        let (mut train, mut ratings) = (Rows::default(), Vec::new());
        for rows in self.rows.chunk_by(|a, b| a.0 == b.0) {
            for row in &rows[..rows.len().saturating_sub(2)] {
                train.user.push(row.0);
                train.item.push(row.1);
                ratings.push(row.2);
            }
        }
        let side = |name: &str, ids: &IdMap| -> HashMap<u32, Vec<String>> {
            let rows = read(folder, name, |f| f.iter().map(|&v| v.to_owned()).collect::<Vec<_>>()).into_iter();
            rows.filter_map(|f| Some((ids.get(&Id::Int(f[0].parse().unwrap()))?, f))).collect()
        };
        let (user, item) = (side("user", &self.users), side("item", &self.items));
        let text = |rows: &HashMap<u32, Vec<String>>, n: usize, column: usize| {
            let of = |id: u32| rows.get(&id).and_then(|f| f.get(column)).filter(|v| !v.is_empty()).cloned();
            Column::Text((0..n as u32).map(of).collect())
        };
        let genres = |id: u32| match item.get(&id).and_then(|f| f.get(3)) {
            Some(genres) => genres.split_whitespace().map(str::to_owned).collect(),
            None => Vec::new(),
        };
        let (n_users, n_items) = (self.users.len(), self.items.len());
        let columns = [
            ("age", Side::User, text(&user, n_users, 1)),
            ("gender", Side::User, text(&user, n_users, 2)),
            ("occupation", Side::User, text(&user, n_users, 3)),
            ("release_year", Side::Item, text(&item, n_items, 2)),
            ("genres", Side::Item, Column::Lists((0..n_items as u32).map(genres).collect())),
        ];
        let (mut of_users, mut of_items) = (Vec::new(), Vec::new());
        let mut fields = FieldSet { n_users, n_items, fields: Vec::new() };
        for (name, side, column) in &columns {
            let field = Field::learn(name, *side, column).unwrap();
            let values = field.encode(column).unwrap();
            if *side == Side::User { &mut of_users } else { &mut of_items }.push(values);
            fields.fields.push(field);
        }
        let (users, items) = (Entities::all(n_users, of_users), Entities::all(n_items, of_items));
        let none = Rows::default();
        work(&Ratings {
            fields: &fields,
            users: &users,
            items: &items,
            train: &train,
            train_ratings: &ratings,
            valid: &none,
            valid_ratings: &[],
        });
    }
}

/// `row` of each line of a file of RecBole's, split at tabs.
fn read<T>(folder: &Path, kind: &str, row: impl Fn(&[&str]) -> T) -> Vec<T> {
    let path = folder.join(format!("ml-100k.{kind}"));
    let text = fs_err::read_to_string(path).unwrap_or_else(|e| panic!("{e}"));
    text.lines().skip(1).map(|line| row(&line.split('\t').collect::<Vec<&str>>())).collect()
}

/// The last line: the report with this process's memory and threads.
fn finish(mut report: Json) {
    let more = json!({"peak_rss_mib": peak_rss(), "threads": rayon::current_num_threads()});
    report.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    println!("{report}");
}

fn usage() -> libc::rusage {
    // SAFETY: all-zero bytes are a valid `rusage`, and `getrusage` writes one to a valid place.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    }
}

/// User and system seconds of this process.
fn cpu_seconds() -> f64 {
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 * 1e-6;
    let usage = usage();
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Most memory that this process has held, MiB. (`ru_maxrss` also counts the process that started this one.)
fn peak_rss() -> f64 {
    let status = fs_err::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
    kib.unwrap_or(usage().ru_maxrss as f64) / 1024.0
}
