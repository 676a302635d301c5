//! DataFusion's and Parquet's errors in the terms of the house: who is at fault, and the way out.
//!
//! In: an error from a plan, a scan or a stream. Out: [`Error`] with the exit code that tells
//! a scheduler what to do.

use arrow::error::ArrowError;
use datafusion::error::DataFusionError;
use parquet::errors::ParquetError;

use crate::error::{Error, Fault};

/// What went wrong when a plan was made or run. Errors of our own that travelled through
/// DataFusion come back as they were.
///
/// - syntax, unknown tables and columns, what SQL does not offer: exit 78 (a stage's SQL is part
///   of the pipeline file; `tailfuse sql` turns it into exit 2)
/// - more memory than the limit allows: exit 78, with what to set
/// - a value that cannot be cast, a damaged file: exit 65
/// - the object store or the spill disk: exit 75
pub fn from_datafusion(e: DataFusionError) -> Error {
    if let Some(ours) = ours(&e) {
        return ours;
    }
    let message = e.strip_backtrace();
    match e.find_root() {
        DataFusionError::ResourcesExhausted(text) => exhausted(text),
        DataFusionError::ObjectStore(e) => from_store(e, message),
        DataFusionError::ParquetError(e) => from_parquet_ref(e, message),
        DataFusionError::IoError(_) => Error::environment(message),
        DataFusionError::ArrowError(e, _) => match e.as_ref() {
            ArrowError::CastError(_)
            | ArrowError::ParseError(_)
            | ArrowError::CsvError(_)
            | ArrowError::DivideByZero
            | ArrowError::ArithmeticOverflow(_)
            | ArrowError::ComputeError(_)
            | ArrowError::ParquetError(_)
            | ArrowError::InvalidArgumentError(_) => Error::data(message),
            ArrowError::IoError(..) => Error::environment(message),
            ArrowError::MemoryError(text) => exhausted(text),
            _ => Error::internal(message),
        },
        DataFusionError::SQL(..)
        | DataFusionError::Plan(_)
        | DataFusionError::SchemaError(..)
        | DataFusionError::NotImplemented(_)
        | DataFusionError::Configuration(_)
        | DataFusionError::Collection(_)
        | DataFusionError::Diagnostic(..) => Error::spec(plain(&message)),
        DataFusionError::Execution(_) | DataFusionError::External(_) => Error::data(message),
        _ => Error::internal(message),
    }
}

/// What went wrong with a Parquet file called `file`: damage is the data's fault (exit 65), a
/// store that does not answer is the environment's (exit 75).
pub fn from_parquet(e: ParquetError, file: &str) -> Error {
    if let ParquetError::External(inner) = &e
        && let Some(store) = inner.downcast_ref::<object_store::Error>()
    {
        return from_store(store, format!("cannot read {file}: {}", crate::tables::store_errors::text(store)));
    }
    damaged(file, &e.to_string())
}

/// A file that says it is Parquet and is not, or no longer.
pub fn damaged(file: &str, why: &str) -> Error {
    Error::data(format!("{file} is not a readable Parquet file: {why}"))
        .with_help("it is truncated, corrupt or of another format; write it again, or leave it out of the source")
}

fn from_parquet_ref(e: &ParquetError, message: String) -> Error {
    if let ParquetError::External(inner) = e
        && let Some(store) = inner.downcast_ref::<object_store::Error>()
    {
        return from_store(store, message);
    }
    Error::data(message).with_help("a Parquet file is truncated or corrupt; write it again")
}

fn from_store(e: &object_store::Error, message: String) -> Error {
    match e {
        object_store::Error::NotFound { .. } => Error::data(message),
        _ => Error::environment(message),
    }
}

/// The pool's report ends with what would have been needed; the user needs a setting.
fn exhausted(text: &str) -> Error {
    Error::spec(format!("SQL needs more memory than its limit allows: {}", plain(text)))
        .with_help("raise `memory_limit` (of the `sql` stage, or of the pipeline), for example to twice its value, or let the query read fewer columns")
}

/// Without DataFusion's own prefixes, which say nothing to a user.
fn plain(message: &str) -> String {
    let mut rest = message.trim();
    for prefix in [
        "Error during planning: ",
        "SQL error: ",
        "Schema error: ",
        "Invalid or Unsupported Configuration: ",
        "Resources exhausted: ",
    ] {
        rest = rest.strip_prefix(prefix).unwrap_or(rest);
    }
    rest.to_owned()
}

/// An [`Error`] that went through a stream as an external error, wherever it is wrapped.
fn ours(e: &DataFusionError) -> Option<Error> {
    let found = match e {
        DataFusionError::External(inner) => match inner.downcast_ref::<Error>() {
            Some(found) => found,
            None => return ours(inner.downcast_ref::<DataFusionError>()?),
        },
        DataFusionError::Context(_, inner) | DataFusionError::Diagnostic(_, inner) => return ours(inner),
        DataFusionError::Shared(inner) => return ours(inner),
        DataFusionError::ArrowError(inner, _) => match inner.as_ref() {
            ArrowError::ExternalError(inner) => match inner.downcast_ref::<Error>() {
                Some(found) => found,
                None => return ours(inner.downcast_ref::<DataFusionError>()?),
            },
            _ => return None,
        },
        _ => return None,
    };
    Some(Error { fault: found.fault, message: found.message.clone(), help: found.help.clone(), source: None })
}

/// An error of ours on its way through a DataFusion stream.
pub fn into_datafusion(e: Error) -> DataFusionError {
    DataFusionError::External(Box::new(e))
}

/// The same mistake made on the command line: exit 2 instead of 78.
pub fn as_usage(mut e: Error) -> Error {
    if e.fault == Fault::Spec {
        e.fault = Fault::Usage;
    }
    e
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_ours_survives_the_way_through_a_stream() {
        let ours = Error::data("row 3 is wrong").with_help("mend it");
        let through = DataFusionError::Context("scan".into(), Box::new(into_datafusion(ours)));
        let back = from_datafusion(through);
        assert_eq!((back.fault, back.message.as_str()), (Fault::Data, "row 3 is wrong"));
        assert_eq!(back.help.as_deref(), Some("mend it"));
    }

    #[test]
    fn faults_follow_the_kind_of_error() {
        let fault = |e| from_datafusion(e).fault;
        assert_eq!(fault(DataFusionError::Plan("no such table".into())), Fault::Spec);
        assert_eq!(fault(DataFusionError::ResourcesExhausted("3 MB".into())), Fault::Spec);
        assert_eq!(fault(DataFusionError::from(ArrowError::CastError("x".into()))), Fault::Data);
        let gone = object_store::Error::NotFound { path: "a".into(), source: "b".into() };
        assert_eq!(fault(DataFusionError::ObjectStore(Box::new(gone))), Fault::Data);
        let down = object_store::Error::Generic { store: "S3", source: "b".into() };
        assert_eq!(fault(DataFusionError::ObjectStore(Box::new(down))), Fault::Environment);
        assert_eq!(as_usage(from_datafusion(DataFusionError::Plan("x".into()))).fault, Fault::Usage);
    }
}
