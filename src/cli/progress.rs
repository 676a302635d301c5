//! A run as a person sees it: bars on a terminal, else a line each 10%.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use super::printer::Printer;
use crate::pipeline::cache::Record;
use crate::pipeline::events::{Events, NodePlace};
use crate::stages::Observer;

/// Draws a run.
pub struct Progress {
    printer: Printer,
    /// The bar of the node at work; it goes when the node ends.
    current: Mutex<Option<Arc<NodeProgress>>>,
}

impl Progress {
    /// On a printer.
    pub fn new(printer: Printer) -> Self {
        Progress { printer, current: Mutex::new(None) }
    }

    fn end(&self) {
        if let Ok(mut current) = self.current.lock()
            && let Some(node) = current.take()
        {
            node.clear();
        }
    }
}

/// Progress of one node.
pub struct NodeProgress {
    printer: Printer,
    label: String,
    bar: Option<ProgressBar>,
    unit: Mutex<String>,
    /// What the stage said last of how it stands.
    status: Mutex<String>,
    total: AtomicU64,
    done: AtomicU64,
    tenth: AtomicU64,
    began: Instant,
}

impl NodeProgress {
    /// For a node, or anything else that has a name.
    pub fn new(printer: &Printer, label: String) -> Self {
        let bar = printer.bars().map(|bars| {
            let style = ProgressStyle::with_template("{prefix:<34} {wide_bar} {pos}/{len} {msg} {eta}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = bars.add(ProgressBar::new(0).with_style(style).with_prefix(label.clone()));
            bar.enable_steady_tick(std::time::Duration::from_millis(250));
            bar
        });
        NodeProgress {
            printer: printer.clone(),
            label,
            bar,
            unit: Mutex::new(String::new()),
            status: Mutex::new(String::new()),
            total: AtomicU64::new(0),
            done: AtomicU64::new(0),
            tenth: AtomicU64::new(0),
            began: Instant::now(),
        }
    }

    /// Takes the bar away.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Observer for NodeProgress {
    fn begin(&self, unit: &str, total: u64) {
        if let Ok(mut name) = self.unit.lock() {
            *name = unit.to_owned();
        }
        self.total.store(total, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
        self.tenth.store(0, Ordering::Relaxed);
        if let Ok(mut status) = self.status.lock() {
            status.clear();
        }
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(0);
            bar.set_message(unit.to_owned());
        }
    }

    fn advance(&self, n: u64) {
        let done = self.done.fetch_add(n, Ordering::Relaxed) + n;
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            return;
        }
        let total = self.total.load(Ordering::Relaxed);
        let tenth = (done * 10).checked_div(total).unwrap_or(0);
        // Only the call that crosses a tenth speaks; short work says nothing.
        if tenth > self.tenth.fetch_max(tenth, Ordering::Relaxed) && self.began.elapsed().as_secs() >= 2 {
            let unit = self.unit.lock().map(|u| u.clone()).unwrap_or_default();
            let status = self.status.lock().map(|s| s.clone()).unwrap_or_default();
            let status = if status.is_empty() { status } else { format!("; {status}") };
            let seconds = self.began.elapsed().as_secs_f64();
            let text = format!("{}  {:3}%  {done}/{total} {unit}, {seconds:.0} s{status}", self.label, tenth * 10);
            let fields = [
                ("done", Value::from(done)),
                ("total", total.into()),
                ("unit", unit.into()),
                ("seconds", rounded(seconds)),
            ];
            self.printer.tell(&text, "progress", fields_of(fields));
        }
    }

    fn status(&self, text: &str) {
        if let Some(bar) = &self.bar {
            // The text has its own estimate of the time, and needs the room.
            if let Ok(style) = ProgressStyle::with_template("{prefix:<34} {bar:16} {pos}/{len} {wide_msg}") {
                bar.set_style(style);
            }
            bar.set_message(text.to_owned());
        } else if let Ok(mut status) = self.status.lock() {
            *status = text.to_owned();
        }
    }

    fn note(&self, text: &str) {
        self.printer.tell(&format!("{}  {text}", self.label), text, Map::new());
    }
}

fn fields_of<const N: usize>(fields: [(&str, Value); N]) -> Map<String, Value> {
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// To milliseconds.
fn rounded(seconds: f64) -> Value {
    ((seconds * 1000.0).round() / 1000.0).into()
}

fn label(place: &NodePlace) -> String {
    let width = place.total.to_string().len();
    format!("[{:>width$}/{}] {} ({})", place.index, place.total, place.name, place.kind)
}

impl Events for Progress {
    fn started(&self, place: &NodePlace) -> Arc<dyn Observer> {
        self.end();
        self.printer.log().stage(Some(&place.name));
        self.printer.note("started", fields_of([("kind", place.kind.as_str().into())]));
        let node = Arc::new(NodeProgress::new(&self.printer, label(place)));
        if let Ok(mut current) = self.current.lock() {
            *current = Some(node.clone());
        }
        node
    }

    fn cached(&self, place: &NodePlace, record: &Record) {
        self.end();
        let fields = fields_of([("kind", place.kind.as_str().into()), ("seconds", rounded(record.seconds))]);
        let text = format!("{}  cached ({:.1} s when it ran)", label(place), record.seconds);
        self.printer.tell(&text, "cached", fields);
    }

    fn finished(&self, place: &NodePlace, record: &Record) {
        self.end();
        let rows: Vec<String> =
            record.outputs.iter().filter_map(|(name, o)| o.rows.map(|n| format!("{name} {n}"))).collect();
        let rows = if rows.is_empty() { String::new() } else { format!("  rows: {}", rows.join(", ")) };
        let counts = record.outputs.iter().filter_map(|(name, o)| Some((name.clone(), o.rows?.into())));
        let fields = fields_of([
            ("kind", place.kind.as_str().into()),
            ("seconds", rounded(record.seconds)),
            ("rows", Value::Object(counts.collect())),
            ("counters", Value::Object(record.counters.clone())),
        ]);
        self.printer.tell(&format!("{}  {:.1} s{rows}", label(place), record.seconds), "finished", fields);
    }

    fn line(&self, text: &str) {
        self.printer.say(text);
    }
}
