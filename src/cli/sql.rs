//! `tailfuse sql`: ask a pipeline's sources, stage outputs and published tables.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::printer::Printer;
use super::{PipelineArgs, key_value};
use crate::error::{Error, Result};
use crate::pipeline::nodes::Surroundings;
use crate::pipeline::tables_of;
use crate::query::{Format, plan_query, write_rows};
use crate::tables::sql_errors::{as_usage, from_datafusion};

/// Rows that a text table shows at most.
const SHOWN: usize = 1000;

/// Arguments of `sql`.
#[derive(Debug, Args)]
#[command(after_help = "\
Tables: sources by name (`interactions`), stage outputs as `stage.output` or the bare stage name for
its first output (`parts.train`, `fused`), published tables by name (`recommendations`, `runs`, `metrics`),
and what the LLM answered in all runs: `ledger`, and `ledger_orders` where orders are reused.
`show tables` lists them.

Examples:
  tailfuse sql \"select source, count(*) from recommendations group by 1\"
  tailfuse sql --file sql/examples/tail_users.sql --format csv --output tail.csv")]
pub struct SqlArgs {
    /// The question; only statements that read are taken.
    #[arg(required_unless_present = "file")]
    query: Option<String>,
    /// A file that holds the question.
    #[arg(long, value_name = "FILE", conflicts_with = "query")]
    file: Option<PathBuf>,
    /// Whose tables.
    #[arg(short, long, value_name = "FILE", env = "TAILFUSE_PIPELINE", default_value = "pipelines/demo.toml")]
    pipeline: PathBuf,
    /// Value of a parameter, as in `run`.
    #[arg(long = "param", value_name = "NAME=VALUE", value_parser = key_value)]
    params: Vec<(String, String)>,
    /// Replaces one key of the file, as in `run`.
    #[arg(long = "set", value_name = "STAGE.KEY=VALUE", value_parser = key_value)]
    sets: Vec<(String, String)>,
    /// Lets the question name files: `select * from 'more.parquet'`. Without it, SQL sees the pipeline's tables only.
    #[arg(long)]
    allow_paths: bool,
    /// How the rows come out.
    #[arg(long, value_enum, default_value = "table")]
    format: OutputFormat,
    /// Where the rows go; stdout by default.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Formats of `--format`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum OutputFormat {
    /// For people.
    Table,
    /// With a header line.
    Csv,
    /// One array of objects.
    Json,
    /// Needs --output.
    Parquet,
}

/// Asks and prints.
pub async fn main(args: SqlArgs, printer: &Printer) -> Result<()> {
    let query = match (&args.query, &args.file) {
        (Some(query), _) => query.clone(),
        (None, Some(file)) => {
            fs_err::read_to_string(file).map_err(|e| Error::usage("cannot read --file").because(e))?
        }
        (None, None) => return Err(Error::usage("there is no question; give a query or --file")),
    };
    let format = match args.format {
        OutputFormat::Table => Format::Table,
        OutputFormat::Csv => Format::Csv,
        OutputFormat::Json => Format::Json,
        OutputFormat::Parquet if args.output.is_none() => {
            return Err(Error::usage("--format parquet needs --output FILE"));
        }
        OutputFormat::Parquet => Format::Parquet,
    };
    // A statement that would write is refused before anything is opened.
    crate::query::read_only::check(&query).map_err(as_usage)?;
    let pipeline = PipelineArgs { pipeline: args.pipeline, params: args.params, sets: args.sets }.load()?;
    let around = Surroundings::of(&pipeline)?;
    let (session, missing) = tables_of::session(&pipeline, &around).await?;
    let session = if args.allow_paths { session.enable_url_table() } else { session };
    let with_missing = |e: Error| {
        let e = as_usage(e);
        match missing.is_empty() {
            true => e,
            false => {
                let help = e.help.clone().map(|h| format!("{h}\n  ")).unwrap_or_default();
                e.with_help(format!(
                    "{help}not there yet, since they have not run with these settings: {}",
                    missing.join(", ")
                ))
            }
        }
    };
    let frame = plan_query(&session, &query).await.map_err(with_missing)?;
    let rows = frame.execute_stream().await.map_err(from_datafusion)?;
    match &args.output {
        None => {
            write_rows(rows, format, SHOWN, std::io::stdout()).await?;
        }
        Some(file) => {
            // Whole or not at all: a query that fails half-way leaves the old file.
            let mut bytes = Vec::new();
            let n = write_rows(rows, format, usize::MAX, &mut bytes).await?;
            fs_err::write(file, &bytes).map_err(|e| Error::environment("cannot write --output").because(e))?;
            printer.say(&format!("{n} rows to {}", file.display()));
        }
    }
    Ok(())
}
