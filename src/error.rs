//! The one error type of the house: who is at fault, what happened, and the way out.
//!
//! In: every module returns [`Result`]. Out: `main.rs`, and only it, turns
//! [`Fault::exit_code`] into the process's exit code and prints the message and the hint.
//! The codes follow sysexits where it has one (see `docs/operations.md`).

use std::fmt;

/// Who is at fault, which decides the exit code and whether a retry can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// An audit refused to publish; what was published before stands. Exit 1.
    Audit,
    /// A `[[test]]` of the pipeline failed. Exit 1.
    Tests,
    /// Wrong command line, or a statement that this verb refuses. Exit 2.
    Usage,
    /// Input data is wrong: a missing column, a wrong type, an unreadable file. Exit 65.
    Data,
    /// Our bug. Exit 70.
    Internal,
    /// A resource failed and may come back: store, download, disk. Exit 75, retry.
    Environment,
    /// The pipeline file is wrong, or asks for what cannot be. Exit 78.
    Spec,
    /// There is nothing to do. Exit 99 (a skip for Airflow).
    NothingToDo,
    /// SIGINT; stopped at a row boundary, resumable. Exit 130.
    Interrupted,
    /// SIGTERM; stopped at a row boundary, resumable. Exit 143.
    Terminated,
}

impl Fault {
    /// The process's exit code for this fault.
    pub fn exit_code(self) -> u8 {
        match self {
            Fault::Audit | Fault::Tests => 1,
            Fault::Usage => 2,
            Fault::Data => 65,
            Fault::Internal => 70,
            Fault::Environment => 75,
            Fault::Spec => 78,
            Fault::NothingToDo => 99,
            Fault::Interrupted => 130,
            Fault::Terminated => 143,
        }
    }

    /// Whether running the same command again may succeed without anyone's help.
    pub fn retryable(self) -> bool {
        matches!(self, Fault::Environment | Fault::Interrupted | Fault::Terminated)
    }

    /// The stable word for this fault in the result document.
    pub fn code(self) -> &'static str {
        match self {
            Fault::Audit => "audit_refused",
            Fault::Tests => "tests_failed",
            Fault::Usage => "usage",
            Fault::Data => "input_data",
            Fault::Internal => "internal",
            Fault::Environment => "environment",
            Fault::Spec => "pipeline_file",
            Fault::NothingToDo => "nothing_to_do",
            Fault::Interrupted => "interrupted",
            Fault::Terminated => "terminated",
        }
    }
}

/// What went wrong. `message` names the thing and the place; `help` the way out.
#[derive(Debug, thiserror::Error)]
pub struct Error {
    /// Who is at fault.
    pub fault: Fault,
    /// One message that names the thing and the place; may have several lines
    /// when it carries a rendered excerpt of the pipeline file.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
    /// The error below, for `--verbose`.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The house's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.help {
            Some(help) => write!(f, "\n  help: {help}"),
            None => Ok(()),
        }
    }
}

impl Error {
    /// An error with a fault and a message.
    pub fn new(fault: Fault, message: impl Into<String>) -> Self {
        Error { fault, message: message.into(), help: None, source: None }
    }
    /// Input data is wrong (exit 65).
    pub fn data(message: impl Into<String>) -> Self {
        Error::new(Fault::Data, message)
    }
    /// The pipeline file is wrong or asks for what cannot be (exit 78).
    pub fn spec(message: impl Into<String>) -> Self {
        Error::new(Fault::Spec, message)
    }
    /// A resource failed and may come back (exit 75).
    pub fn environment(message: impl Into<String>) -> Self {
        Error::new(Fault::Environment, message)
    }
    /// Our bug (exit 70).
    pub fn internal(message: impl Into<String>) -> Self {
        Error::new(Fault::Internal, message)
    }
    /// Wrong command line (exit 2).
    pub fn usage(message: impl Into<String>) -> Self {
        Error::new(Fault::Usage, message)
    }
    /// Adds the way out.
    pub fn with_help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
    /// Keeps the error below and appends its text to the message.
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        let source = source.into();
        self.message = format!("{}: {source}", self.message);
        self.source = Some(source);
        self
    }
    /// Puts the place in front of the message: `stage `x`: ...`.
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }
}

impl From<arrow::error::ArrowError> for Error {
    /// Arrow kernels fail on our own wrong assumptions; where data can be at
    /// fault, map the error by hand with [`Error::data`].
    fn from(e: arrow::error::ArrowError) -> Self {
        Error::internal("an Arrow operation failed").because(e)
    }
}

/// A panic message for the result document (exit 70) from a joined blocking task.
impl From<tokio::task::JoinError> for Error {
    fn from(e: tokio::task::JoinError) -> Self {
        Error::internal("a worker stopped unexpectedly").because(e)
    }
}
