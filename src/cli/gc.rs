//! `tailfuse gc`: removes artifacts that no run needs any more.

use std::path::PathBuf;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};

use super::PipelineArgs;
use super::printer::Printer;
use crate::error::{Error, Result};
use crate::pipeline::gc::{GcOptions, GcReport, gc};
use crate::pipeline::nodes::Surroundings;

/// Arguments of `gc`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tailfuse gc pipelines/nightly.toml --dry-run
  tailfuse gc pipelines/nightly.toml --pipeline pipelines/calibrate.toml --older-than 14
  tailfuse gc pipelines/nightly.toml --answers-older-than 400")]
pub struct GcArgs {
    #[command(flatten)]
    first: PipelineArgs,
    /// Another pipeline that shares the artifacts; may be given several times.
    #[arg(long = "pipeline", id = "also", value_name = "FILE")]
    also: Vec<PathBuf>,
    /// Only list what would go, with sizes.
    #[arg(long)]
    dry_run: bool,
    /// Days that a result is kept though neither these pipelines nor the last runs need it. What a cut-off write left is
    /// kept for a day at most.
    #[arg(long, value_name = "DAYS", default_value_t = 7.0, value_parser = days)]
    older_than: f64,
    /// Runs of each pipeline in the journal whose artifacts are kept.
    #[arg(long, value_name = "N", default_value_t = 7)]
    keep_runs: usize,
    /// Also remove answers of the LLM, kept orders and figures of fits that are older. They are paid for again where they
    /// are needed; without this none is removed.
    #[arg(long, value_name = "DAYS", value_parser = days)]
    answers_older_than: Option<f64>,
    /// One JSON document in place of a table.
    #[arg(long)]
    json: bool,
}

fn days(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(days) if days.is_finite() && days >= 0.0 => Ok(days),
        _ => Err("give a number of days, 0 or more".to_owned()),
    }
}

/// Removes, or lists, on stdout.
pub async fn main(args: GcArgs, printer: &Printer) -> Result<()> {
    let mut pipelines = vec![args.first.load()?];
    for file in &args.also {
        pipelines.push(crate::pipeline::load(file, &[], &[])?);
    }
    let mut with_surroundings = Vec::with_capacity(pipelines.len());
    for pipeline in pipelines {
        let around = Surroundings::of(&pipeline)?;
        with_surroundings.push((pipeline, around));
    }
    let options = GcOptions {
        dry_run: args.dry_run,
        older_than: args.older_than,
        keep_runs: args.keep_runs,
        answers_older_than: args.answers_older_than,
        now: chrono::Utc::now(),
    };
    let report = gc(&with_surroundings, &options).await?;
    match args.json {
        true => {
            let text = serde_json::to_string_pretty(&report).map_err(|e| Error::internal("gc as JSON").because(e))?;
            printer.data(&text);
        }
        false => printer.data(&table(&report)),
    }
    Ok(())
}

fn table(report: &GcReport) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(["what", "stage", "files", "size", "age", "where"]);
    for removal in &report.removed {
        table.add_row([
            removal.what.to_owned(),
            removal.stage.clone().unwrap_or_default(),
            removal.files.to_string(),
            size(removal.bytes),
            format!("{:.1} d", removal.age_days),
            removal.place.clone(),
        ]);
    }
    for column in [2, 3, 4] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let (n, verb) = (report.removed.len(), if report.dry_run { "would go" } else { "removed" });
    let rest = format!("{n} {verb}, {}; {} stay", size(report.bytes), size(report.kept_bytes));
    let rows = if n == 0 { String::new() } else { format!("{table}\n") };
    match report.runs_at_work.is_empty() {
        true => format!("{rows}{rest}"),
        false => format!("{rows}{rest}\nat work, and spared: {}", report.runs_at_work.join(", ")),
    }
}

/// Bytes for a person.
fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return format!("{value:.*} {unit}", usize::from(unit != "B"));
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}
