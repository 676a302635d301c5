//! Named points at which a test stops the process or slows it down; for tests only.
//!
//! In: the environment variable `TAILFUSE_FAULT`, a comma-separated list of `POINT[:N]=ACTION`. Out: at the N-th passing of
//! the point (every passing where no N is given) the action: `kill` (SIGKILL, nothing is cleaned up), `term` or `int` (SIGTERM or
//! SIGINT to this process), `panic` (a bug of ours) or `slow:MS` (waits so many milliseconds). Without the variable a point costs
//! one look at a value that is never set. The points that there are: [`POINTS`].

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Name of the environment variable.
pub const VARIABLE: &str = "TAILFUSE_FAULT";

/// The points, in the order in which a run meets them.
pub const POINTS: &[&str] = &[
    // A batch of a source was read.
    "source-row",
    // The tables of a source or a stage are on the store, its `stage.json` is not.
    "stage-data",
    // `stage.json` was put.
    "stage-done",
    // An epoch of a recommender ended, before its checkpoint.
    "train-epoch",
    // A step of a tuning ended.
    "tune-step",
    // A checkpoint's files are there, the pointer to them is not.
    "checkpoint-data",
    // A checkpoint is whole.
    "checkpoint-done",
    // The LLM answered a prompt, which is not in the ledger yet.
    "rerank-row",
    // A segment of answers was put.
    "ledger-put",
    // Segments were merged, the small ones are still there.
    "ledger-merged",
    // A batch of a table was encoded.
    "table-batch",
    // A batch of a published table was given to the writer.
    "write-row",
    // The writer of a published table has all rows.
    "write-data",
    // Right before the commit: of a Delta table, all data is written; of a plain file, the put is data and commit.
    "write-commit",
    // A table was published, and nothing records it yet.
    "write-done",
    // The run's metrics were written, its row in `runs` was not.
    "runs-row",
];

/// What happens at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Kill,
    Terminate,
    Interrupt,
    Panic,
    Slow(Duration),
}

/// One entry of the variable.
#[derive(Debug)]
struct Fault {
    point: String,
    /// The passing that it waits for, from 1; every one where it is `None`.
    at: Option<u64>,
    action: Action,
    passed: AtomicU64,
}

fn parse(text: &str) -> Vec<Fault> {
    let one = |entry: &str| -> Option<Fault> {
        let (place, action) = entry.trim().split_once('=')?;
        let action = match action.split_once(':') {
            None if action == "kill" => Action::Kill,
            None if action == "term" => Action::Terminate,
            None if action == "int" => Action::Interrupt,
            None if action == "panic" => Action::Panic,
            Some(("slow", ms)) => Action::Slow(Duration::from_millis(ms.parse().ok()?)),
            _ => return None,
        };
        let (point, at) = match place.split_once(':') {
            Some((point, n)) => (point, Some(n.parse().ok()?)),
            None => (place, None),
        };
        POINTS.contains(&point).then(|| Fault { point: point.to_owned(), at, action, passed: AtomicU64::new(0) })
    };
    text.split(',').filter_map(one).collect()
}

fn faults() -> &'static [Fault] {
    static FAULTS: OnceLock<Vec<Fault>> = OnceLock::new();
    FAULTS.get_or_init(|| std::env::var(VARIABLE).map(|text| parse(&text)).unwrap_or_default())
}

/// Passes the point `name`, one of [`POINTS`].
pub fn point(name: &str) {
    for fault in faults().iter().filter(|f| f.point == name) {
        let passing = 1 + fault.passed.fetch_add(1, Ordering::SeqCst);
        if fault.at.is_none_or(|at| at == passing) {
            act(name, fault.action);
        }
    }
}

fn act(name: &str, action: Action) {
    match action {
        Action::Slow(time) => std::thread::sleep(time),
        Action::Kill => signal_self(SIGKILL),
        Action::Terminate => signal_self(SIGTERM),
        Action::Interrupt => signal_self(SIGINT),
        Action::Panic => panic!("{VARIABLE} asks for a panic at `{name}`"),
    }
}

#[cfg(unix)]
use libc::{SIGINT, SIGKILL, SIGTERM};
#[cfg(not(unix))]
const SIGINT: i32 = 2;
#[cfg(not(unix))]
const SIGKILL: i32 = 9;
#[cfg(not(unix))]
const SIGTERM: i32 = 15;

/// Sends a signal to this process.
fn signal_self(signal: i32) {
    #[cfg(unix)]
    // SAFETY: `kill` and `getpid` take and give plain numbers.
    unsafe {
        libc::kill(libc::getpid(), signal);
    }
    #[cfg(not(unix))]
    let _ = signal;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_and_others_are_left_out() {
        let found = parse("rerank-row:5=kill, train-epoch=slow:20,nowhere=kill,write-done=explode,stage-data:x=kill");
        let found: Vec<_> = found.iter().map(|f| (f.point.as_str(), f.at, f.action)).collect();
        let slow = Action::Slow(Duration::from_millis(20));
        assert_eq!(found, [("rerank-row", Some(5), Action::Kill), ("train-epoch", None, slow)]);
    }
}
