//! `tailfuse restore`: a published Delta table back to an earlier version.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::printer::Printer;
use super::{PipelineArgs, key_value};
use crate::error::{Error, Result};
use crate::tables::Store;
use crate::tables::delta::At;
use crate::tables::delta::maintain::restore;

/// Arguments of `restore`.
#[derive(Debug, Args)]
#[command(after_help = "\
The result document of each run has the version that it published; `describe history` of any Delta reader lists them.
What came after the version stays in the history, so a restore can be undone by another one.

Example:
  tailfuse restore recommendations --version 41 --pipeline pipelines/nightly.toml")]
pub struct RestoreArgs {
    /// The published table.
    table: String,
    /// The version whose rows are to be the table's again.
    // Clap keeps `--version` of subcommands for itself unless the id differs.
    #[arg(long = "version", value_name = "N", required_unless_present = "timestamp")]
    to_version: Option<u64>,
    /// The last version at this time instead (RFC 3339, or `YYYY-MM-DD[ HH:MM:SS]` in UTC).
    #[arg(long, value_name = "TIME", conflicts_with = "to_version")]
    timestamp: Option<String>,
    /// Whose warehouse.
    #[arg(short, long, value_name = "FILE", env = "TAILFUSE_PIPELINE", default_value = "pipelines/demo.toml")]
    pipeline: PathBuf,
    /// Value of a parameter, as in `run`.
    #[arg(long = "param", value_name = "NAME=VALUE", value_parser = key_value)]
    params: Vec<(String, String)>,
    /// Replaces one key of the file, as in `run`.
    #[arg(long = "set", value_name = "STAGE.KEY=VALUE", value_parser = key_value)]
    sets: Vec<(String, String)>,
}

/// Restores, and prints one JSON object.
pub async fn main(args: RestoreArgs, printer: &Printer) -> Result<()> {
    let at = match (args.to_version, &args.timestamp) {
        (Some(version), _) => At::Version(version),
        (None, Some(text)) => {
            At::time(text).ok_or_else(|| Error::usage(format!("--timestamp is `{text}`, which is not a time")))?
        }
        (None, None) => return Err(Error::usage("say which state: --version N or --timestamp TIME")),
    };
    let pipeline = PipelineArgs { pipeline: args.pipeline, params: args.params, sets: args.sets }.load()?;
    let store = Store::open(&pipeline.warehouse, &pipeline.root)?.child(&args.table);
    let done = restore(&store, at).await?;
    printer.say(&format!(
        "{} is as it was in version {} ({} files are back, {} are gone); this is version {}, the bad one was {}",
        store.display(""),
        done.to,
        done.files_restored,
        done.files_removed,
        done.version,
        done.from,
    ));
    let document = json!({
        "status": "ok", "table": args.table, "uri": store.display(""), "restored_to": done.to,
        "version": done.version, "was": done.from,
    });
    printer.data(&document.to_string());
    Ok(())
}
