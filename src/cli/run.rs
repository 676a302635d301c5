//! `tailfuse run`: run a pipeline, show what came out, print the result document.

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use futures::FutureExt;
use serde_json::Value;

use super::printer::Printer;
use super::progress::Progress;
use super::result_document;
use super::{PipelineArgs, Sandbox};
use crate::error::{Error, Fault, Result};
use crate::pipeline::Pipeline;
use crate::pipeline::current::{is_current, partitions};
use crate::pipeline::events::Events;
use crate::pipeline::lineage::Lineage;
use crate::pipeline::nodes::Surroundings;
use crate::pipeline::plan::plan;
use crate::pipeline::run::{RunOptions, RunReport, run};
use crate::pipeline::summary;
use crate::stages::context::{Cancel, Shard};

/// Arguments of `run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tailfuse run pipelines/demo.toml
  tailfuse run pipelines/demo.toml --param ds=2026-11-22 --set rerank.budget.users=20
  tailfuse run pipelines/demo.toml --from rerank --result /airflow/xcom/return.json
  tailfuse run pipelines/nightly.toml --param ds=2026-11-22 --skip-current --budget 45
  tailfuse run pipelines/nightly.toml --param ds=2026-11-22 --shard 0/4")]
pub struct RunArgs {
    #[command(flatten)]
    pipeline: PipelineArgs,
    #[command(flatten)]
    sandbox: Sandbox,
    /// Run this stage and all that read from it again, cached or not.
    #[arg(long, value_name = "STAGE")]
    from: Option<String>,
    /// Run everything again, cached or not. Answers of the LLM are still taken from the ledger, and fits of a search
    /// from those that were kept.
    #[arg(long, conflicts_with = "from")]
    fresh: bool,
    /// Do everything but publish: rows and columns are checked against the published tables, and nothing of the run can be
    /// seen in the warehouse afterwards. The next run without it finds the stages cached.
    #[arg(long)]
    no_publish: bool,
    /// Run this stage and what it reads from, and nothing else; nothing is published.
    #[arg(long, value_name = "STAGE", conflicts_with = "from")]
    until: Option<String>,
    /// End with exit code 99 where the tables are published already and nothing they depend on has changed.
    #[arg(long, conflicts_with_all = ["from", "fresh", "until", "shard"])]
    skip_current: bool,
    /// Ask the LLM for the i-th of n shares of the users (i from 0). The answers go to the ledger and nothing is
    /// published; a run without --shard, after all shares, fuses and publishes.
    #[arg(long, value_name = "I/N")]
    shard: Option<Shard>,
    /// Minutes that the LLM may take, in place of `budget.minutes` of the stages that ask it tail first. They become a
    /// number of users before such a stage starts, by the rate of the last nights.
    #[arg(long, value_name = "MINUTES", value_parser = minutes)]
    budget: Option<f64>,
    /// Also write the result document to this file.
    #[arg(long, value_name = "FILE")]
    result: Option<PathBuf>,
}

/// Runs; the result document is the last line of stdout, also when the run fails. Where a person watches, the
/// tables come after it on stderr; else it is the last line of both streams together, for schedulers that join them.
pub async fn main(args: RunArgs, printer: &Printer) -> Result<()> {
    let run_id = new_run_id();
    printer.log().run(&run_id);
    let name = args.pipeline.pipeline.display().to_string();
    // A panic is our bug (exit 70), and has a document like any other failure; the hook has printed where it was.
    let outcome = AssertUnwindSafe(work(&args, &run_id, printer)).catch_unwind().await;
    let outcome = outcome.unwrap_or_else(|_| Err(Error::internal("tailfuse stopped at a panic")));
    let (document, texts) = match &outcome {
        Ok((document, texts)) => (document.clone(), texts.as_slice()),
        Err(error) => (result_document::failure(&name, &run_id, error), [].as_slice()),
    };
    let line = printer.log().blot(&document.to_string());
    let written = match &args.result {
        Some(file) => fs_err::write(file, &line).map_err(|e| Error::environment("cannot write --result").because(e)),
        None => Ok(()),
    };
    let show = || texts.iter().for_each(|text| printer.say(&format!("\n{text}")));
    match printer.bars().is_some() {
        true => {
            printer.data(&line);
            show();
        }
        false => {
            show();
            printer.data(&line);
        }
    }
    outcome.map(|_| ()).and(written)
}

/// The result document and the texts for a person.
async fn work(args: &RunArgs, run_id: &str, printer: &Printer) -> Result<(Value, Vec<String>)> {
    let pipeline = args.pipeline.load_within(&args.sandbox)?;
    let around = Surroundings::of(&pipeline)?;
    let options = RunOptions {
        from: args.from.clone(),
        fresh: args.fresh,
        no_publish: args.no_publish,
        until: args.until.clone(),
        shard: args.shard,
        minutes: args.budget,
    };
    if args.skip_current && is_current(&pipeline, &plan(&pipeline, &around, &options).await?).await? {
        let what = partitions(&pipeline);
        return Err(Error::new(
            Fault::NothingToDo,
            format!("{what} is current: nothing that it depends on has changed"),
        ));
    }
    let mut events: Arc<dyn Events> = Arc::new(Progress::new(printer.clone()));
    let lineage = Lineage::start(&pipeline, run_id, &|name| std::env::var(name).ok()).unwrap_or_else(|warning| {
        printer.warn(&warning);
        None
    });
    if let Some(lineage) = &lineage {
        events = lineage.beside(events);
    }
    let cancel = Cancel::default();
    let listener = tokio::spawn(listen(cancel.clone()));
    printer.say(&format!("{}: run {run_id}, seed {}", pipeline.name, pipeline.seed));
    let report = run(&pipeline, &around, &options, run_id, &events, &cancel).await;
    listener.abort();
    printer.log().stage(None);
    let done = match report {
        Ok(report) => finish(&pipeline, &report, options.partial() || options.no_publish).await,
        Err(e) => Err(e),
    };
    if let Some(lineage) = lineage
        && let Some(warning) = lineage.end(done.as_ref().err()).await
    {
        printer.warn(&warning);
    }
    done
}

/// What a finished run leaves behind: rows in `runs` and `metrics` (unless it was a part of one), the document, texts for
/// a person.
async fn finish(pipeline: &Pipeline, report: &RunReport, partial: bool) -> Result<(Value, Vec<String>)> {
    let metrics = summary::metrics(pipeline, report).await?;
    let tables = summary::published(pipeline, report).await?;
    if !partial {
        summary::append_run(pipeline, report, &tables).await?;
    }
    let texts = summary::texts(pipeline, report).await?;
    let rows = metrics.iter().map(summary::MetricRow::to_json).collect();
    Ok((result_document::success(pipeline, report, rows, tables), texts))
}

/// A number of minutes above 0.
pub(super) fn minutes(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(minutes) if minutes.is_finite() && minutes > 0.0 => Ok(minutes),
        _ => Err("give a number of minutes above 0".to_owned()),
    }
}

/// First signal: stop at the next row boundary. Second: the default action.
async fn listen(cancel: Cancel) {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
        else {
            return;
        };
        tokio::select! {
            _ = interrupt.recv() => cancel.request(2),
            _ = terminate.recv() => cancel.request(15),
        }
        let again = tokio::select! {
            _ = interrupt.recv() => libc::SIGINT,
            _ = terminate.recv() => libc::SIGTERM,
        };
        // SAFETY: both take plain numbers; the default action of these signals ends the process.
        unsafe {
            libc::signal(again, libc::SIG_DFL);
            libc::raise(again);
        }
    }
    #[cfg(not(unix))]
    if tokio::signal::ctrl_c().await.is_ok() {
        cancel.request(2);
    }
}

/// `20261124T061200Z-1a2b3c`: sorts by time, unique between machines.
fn new_run_id() -> String {
    let now = chrono::Utc::now();
    format!("{}-{:06x}", now.format("%Y%m%dT%H%M%SZ"), rand::random::<u32>() & 0xff_ffff)
}
