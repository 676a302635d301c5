//! The one place that writes to stdout and stderr, and that knows whether a person is watching.

use std::io::{IsTerminal, Write};

use indicatif::MultiProgress;

/// Where words go.
#[derive(Clone)]
pub struct Printer {
    quiet: bool,
    bars: Option<MultiProgress>,
}

impl Printer {
    /// Bars only where stderr is a terminal and nobody asked for quiet.
    pub fn new(quiet: bool) -> Self {
        let bars = (!quiet && std::io::stderr().is_terminal()).then(MultiProgress::new);
        Printer { quiet, bars }
    }

    /// Where bars are drawn, on a terminal.
    pub fn bars(&self) -> Option<&MultiProgress> {
        self.bars.as_ref()
    }

    /// Talk: to stderr, unless quiet.
    pub fn say(&self, text: &str) {
        if !self.quiet {
            self.always(text);
        }
    }

    /// To stderr, also when quiet: errors and warnings.
    pub fn always(&self, text: &str) {
        // A closed stderr must not end a run.
        self.beside_bars(|| {
            let _ = writeln!(std::io::stderr(), "{text}");
        });
    }

    /// Data: one line to stdout. A reader that has gone away is not an error.
    pub fn data(&self, text: &str) {
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
