//! What goes to stderr: words for a person, or one JSON object a line, and never a secret.
//!
//! In: lines of the run and events of `tracing`. Out: text as it is, or `{time, level, run_id, stage, message, fields}`.
//! Values of environment variables that hold secrets are blotted out of everything that is written, whoever wrote it.

use std::collections::BTreeSet;
use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex};

use clap::ValueEnum;
use serde_json::{Map, Value, json};
use tracing::field::{Field, Visit};
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

/// Values of `--log-format`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people; bars on a terminal.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What stands in the place of a secret.
const BLOT: &str = "***";
/// Shorter values are no secrets, and blotting them out would spoil other words.
const SHORTEST: usize = 8;
/// Parts of the names of variables that hold secrets.
const MARKS: [&str; 6] = ["KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL"];
/// Ends of the names of variables that say where a secret lies.
const PLACES: [&str; 5] = ["_FILE", "_PATH", "_DIR", "_URI", "_URL"];

/// Values that must not be written.
#[derive(Clone, Debug, Default)]
pub struct Secrets(Vec<String>);

impl Secrets {
    /// Values of variables whose name says that they are secret (`AWS_SECRET_ACCESS_KEY`, `OPENLINEAGE_API_KEY`).
    pub fn of_environment() -> Self {
        Secrets::of(std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))))
    }

    fn of(variables: impl Iterator<Item = (String, String)>) -> Self {
        let secret = |name: &str| {
            let name = name.to_ascii_uppercase();
            MARKS.iter().any(|m| name.contains(m)) && !PLACES.iter().any(|p| name.ends_with(p))
        };
        let mut values = BTreeSet::new();
        for (_, value) in variables.filter(|(name, value)| secret(name) && value.len() >= SHORTEST) {
            // As it stands in JSON, where that differs.
            let escaped = Value::from(value.as_str()).to_string();
            values.insert(escaped.trim_matches('"').to_owned());
            values.insert(value);
        }
        // The longest first: one may begin with another.
        let mut values: Vec<String> = values.into_iter().collect();
        values.sort_by_key(|v| std::cmp::Reverse(v.len()));
        Secrets(values)
    }

    /// The text without them.
    pub fn blot(&self, text: &str) -> String {
        self.0.iter().fold(text.to_owned(), |text, secret| match text.contains(secret.as_str()) {
            true => text.replace(secret.as_str(), BLOT),
            false => text,
        })
    }
}

/// Where in a run the words come from.
#[derive(Clone, Debug, Default)]
struct Place {
    run_id: Option<String>,
    stage: Option<String>,
}

/// How lines are made; clones share run, stage and secrets.
#[derive(Clone, Debug, Default)]
pub struct Log {
    format: LogFormat,
    secrets: Arc<Secrets>,
    place: Arc<Mutex<Place>>,
}

impl Log {
    /// With the secrets of the environment.
    pub fn new(format: LogFormat) -> Self {
        Log { format, secrets: Arc::new(Secrets::of_environment()), place: Arc::default() }
    }

    /// Whether lines are JSON.
    pub fn is_json(&self) -> bool {
        self.format == LogFormat::Json
    }

    /// The run that all lines from here on belong to.
    pub fn run(&self, run_id: &str) {
        if let Ok(mut place) = self.place.lock() {
            place.run_id = Some(run_id.to_owned());
        }
    }

    /// The stage or source that lines from here on belong to.
    pub fn stage(&self, stage: Option<&str>) {
        if let Ok(mut place) = self.place.lock() {
            place.stage = stage.map(str::to_owned);
        }
    }

    /// Text without secrets.
    pub fn blot(&self, text: &str) -> String {
        self.secrets.blot(text)
    }

    /// A line: `message` as it is, or as JSON with `fields`.
    pub fn line(&self, level: &str, message: &str, fields: Map<String, Value>) -> String {
        match self.format {
            LogFormat::Text => self.blot(message),
            LogFormat::Json => self.blot(&self.json(level, message, fields)),
        }
    }

    fn json(&self, level: &str, message: &str, fields: Map<String, Value>) -> String {
        let place = self.place.lock().map(|p| p.clone()).unwrap_or_default();
        json!({
            "time": chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true),
            "level": level,
            "run_id": place.run_id,
            "stage": place.stage,
            "message": message.trim(),
            "fields": fields,
        })
        .to_string()
    }

    /// Sends what the libraries and our own modules say through this log. `verbose` counts `-v`; `RUST_LOG` overrides it.
    pub fn listen(&self, verbose: u8) {
        let level = match verbose {
            0 => "error",
            1 => "tailfuse=info",
            _ => "debug",
        };
        let filter = tracing_subscriber::EnvFilter::try_from_default_env()
            .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
        let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(Blotting(self.secrets.clone()));
        // A second subscriber cannot be set; there is none at this point.
        let _ = match self.format {
            LogFormat::Text => lines.try_init(),
            LogFormat::Json => {
                let log = self.clone();
                std::panic::set_hook(Box::new(move |panic| {
                    let mut fields = Map::new();
                    if let Some(place) = panic.location() {
                        fields.insert("at".into(), place.to_string().into());
                    }
                    let text = panic.payload_as_str().unwrap_or("a panic without words");
                    let _ = writeln!(std::io::stderr(), "{}", log.line("error", text, fields));
                }));
                lines.event_format(JsonEvents(self.clone())).try_init()
            }
        };
    }
}

/// stderr without secrets. An event comes in one piece.
#[derive(Clone)]
struct Blotting(Arc<Secrets>);

impl<'a> MakeWriter<'a> for Blotting {
    type Writer = Blotting;
    fn make_writer(&'a self) -> Blotting {
        self.clone()
    }
}

impl Write for Blotting {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        std::io::stderr().write_all(self.0.blot(&text).as_bytes())?;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

/// Events of `tracing` in the same form as the run's own lines.
struct JsonEvents(Log);

impl<S, N> FormatEvent<S, N> for JsonEvents
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> fmt::Result {
        let mut found = Fields::default();
        event.record(&mut found);
        found.fields.insert("target".into(), event.metadata().target().into());
        let level = event.metadata().level().as_str().to_ascii_lowercase();
        writeln!(writer, "{}", self.0.line(&level, &found.message, found.fields))
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    fields: Map<String, Value>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        match (field.name(), value.as_str()) {
            ("message", Some(text)) => self.message = text.to_owned(),
            (name, _) => drop(self.fields.insert(name.to_owned(), value)),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets() -> Secrets {
        let variables = [
            ("AWS_SECRET_ACCESS_KEY", "hunter2-and-more"),
            ("MY_TOKEN", "hunter2-and-more-still"),
            ("QUOTED_SECRET", "with\"a quote"),
            ("SHORT_KEY", "abc"),
            ("SSL_KEY_FILE", "/etc/ssl/keys.pem"),
            ("HOME", "/home/someone"),
        ];
        Secrets::of(variables.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())))
    }

    #[test]
    fn secrets_are_blotted_out() {
        let secrets = secrets();
        assert_eq!(secrets.blot("key=hunter2-and-more;"), "key=***;");
        assert_eq!(secrets.blot("hunter2-and-more-still"), "***", "the longer one as a whole");
        assert_eq!(secrets.blot("{\"k\":\"with\\\"a quote\"}"), "{\"k\":\"***\"}");
        assert_eq!(secrets.blot("abc /etc/ssl/keys.pem /home/someone"), "abc /etc/ssl/keys.pem /home/someone");
    }

    #[test]
    fn lines_are_objects() {
        let log = Log { format: LogFormat::Json, secrets: Arc::new(secrets()), place: Arc::default() };
        log.run("r1");
        log.stage(Some("clean"));
        let fields = Map::from_iter([("rows".to_owned(), Value::from(3))]);
        let line: Value = serde_json::from_str(&log.line("info", "hunter2-and-more\nis out", fields)).unwrap();
        assert_eq!(line["message"], "***\nis out");
        let rest = ["level", "run_id", "stage"].map(|k| line[k].as_str().unwrap().to_owned());
        assert_eq!(rest, ["info", "r1", "clean"]);
        assert_eq!(line["fields"]["rows"], 3);
        assert!(line["time"].as_str().unwrap().ends_with('Z'));
    }
}
