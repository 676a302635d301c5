//! The one place that writes to stdout and stderr, and that knows whether a person is watching.

use std::io::{IsTerminal, Write};

use indicatif::MultiProgress;
use serde_json::{Map, Value};

use super::log::{Log, LogFormat};
use crate::error::{Error, Fault};

/// Where words go.
#[derive(Clone)]
pub struct Printer {
    quiet: bool,
    bars: Option<MultiProgress>,
    log: Log,
}

impl Printer {
    /// Bars only where stderr is a terminal that shows text, and nobody asked for quiet.
    pub fn new(quiet: bool, format: LogFormat) -> Self {
        let draws = !quiet && format == LogFormat::Text && std::io::stderr().is_terminal();
        Printer { quiet, bars: draws.then(MultiProgress::new), log: Log::new(format) }
    }

    /// How lines are made.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Where bars are drawn, on a terminal.
    pub fn bars(&self) -> Option<&MultiProgress> {
        self.bars.as_ref()
    }

    /// Talk: to stderr, unless quiet.
    pub fn say(&self, text: &str) {
        self.tell(text, text, Map::new());
    }

    /// Talk with parts: `text` for a person, `message` and `fields` where lines are JSON. Unless quiet.
    pub fn tell(&self, text: &str, message: &str, fields: Map<String, Value>) {
        if self.quiet {
            return;
        }
        match self.log.is_json() {
            true => self.stderr(&self.log.line("info", message, fields)),
            false => self.stderr(&self.log.blot(text)),
        }
    }

    /// What a machine is told and a person sees without words. Unless quiet.
    pub fn note(&self, message: &str, fields: Map<String, Value>) {
        if self.log.is_json() {
            self.tell("", message, fields);
        }
    }

    /// Something that is wrong and ends nothing, also when quiet.
    pub fn warn(&self, text: &str) {
        match self.log.is_json() {
            true => self.stderr(&self.log.line("warn", text, Map::new())),
            false => self.stderr(&self.log.blot(&format!("warning: {text}"))),
        }
    }

    /// What ended the command, also when quiet.
    pub fn error(&self, error: &Error) {
        let bug = "This is a bug in tailfuse. Please report it with the command and the lines above.";
        let (level, word) = match error.fault {
            Fault::NothingToDo => ("info", "nothing to do"),
            _ => ("error", "error"),
        };
        if self.log.is_json() {
            let mut fields = Map::new();
            fields.insert("code".into(), error.fault.code().into());
            fields.insert("exit_code".into(), error.fault.exit_code().into());
            fields.insert("help".into(), error.help.clone().into());
            fields.insert("retry".into(), error.fault.retryable().into());
            return self.stderr(&self.log.line(level, &error.message, fields));
        }
        self.stderr(&self.log.blot(&format!("{word}: {error}")));
        if error.fault == Fault::Internal {
            self.stderr(&format!("  {bug}"));
        }
    }

    fn stderr(&self, line: &str) {
        // A closed stderr must not end a run.
        self.beside_bars(|| {
            let _ = writeln!(std::io::stderr(), "{line}");
        });
    }

    /// Data: one line to stdout. A reader that has gone away is not an error.
    pub fn data(&self, text: &str) {
        let text = self.log.blot(text);
        self.beside_bars(|| {
            let mut out = std::io::stdout().lock();
            let _ = writeln!(out, "{text}").and_then(|()| out.flush());
        });
    }

    /// Writes while no bar is drawn, so that lines stay whole.
    fn beside_bars(&self, write: impl FnOnce()) {
        match &self.bars {
            Some(bars) => bars.suspend(write),
            None => write(),
        }
    }

    /// Bytes to stdout as they are.
    pub fn bytes(&self, bytes: &[u8]) {
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(bytes).and_then(|()| out.flush());
    }
}
