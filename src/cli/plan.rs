//! `tailfuse plan`: the DAG, and what is cached and what will run.

use clap::Args;
use comfy_table::{Table, presets};

use super::PipelineArgs;
use super::printer::Printer;
use crate::error::{Error, Result};
use crate::pipeline::Pipeline;
use crate::pipeline::cost::{Cost, nights};
use crate::pipeline::journal::RunEntry;
use crate::pipeline::nodes::Surroundings;
use crate::pipeline::plan::{PlannedNode, State, plan};
use crate::pipeline::run::RunOptions;

/// Arguments of `plan`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tailfuse plan pipelines/demo.toml --set rerank.budget.users=20")]
pub struct PlanArgs {
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// As in `run`: this stage and all that read from it will run again.
    #[arg(long, value_name = "STAGE")]
    from: Option<String>,
    /// As in `run`: everything will run again.
    #[arg(long, conflicts_with = "from")]
    fresh: bool,
    /// As in `run`: minutes that the LLM may take.
    #[arg(long, value_name = "MINUTES", value_parser = super::run::minutes)]
    budget: Option<f64>,
    /// One JSON document instead of a table.
    #[arg(long)]
    json: bool,
}

/// Prints the plan on stdout.
pub async fn main(args: PlanArgs, printer: &Printer) -> Result<()> {
    let pipeline = args.pipeline.load()?;
    let around = Surroundings::of(&pipeline)?;
    let options = RunOptions { from: args.from, fresh: args.fresh, minutes: args.budget, ..RunOptions::default() };
    let nodes = plan(&pipeline, &around, &options).await?;
    if args.json {
        let text = serde_json::to_string_pretty(&nodes).map_err(|e| Error::internal("plan as JSON").because(e))?;
        printer.data(&text);
    } else {
        let runs = nights(&pipeline).await?;
        printer.data(&format!("{}\n{}", table(&nodes), cost(&pipeline, &nodes, &runs)));
    }
    Ok(())
}

fn table(nodes: &[PlannedNode]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header([
        "node",
        "kind",
        "reads",
        "state",
        "last took",
        "at most",
        "artifacts/",
    ]);
    for node in nodes {
        let state = match &node.state {
            State::Cached => "cached".to_owned(),
            State::WillRun { why } => format!("will run: {why}"),
        };
        let seconds = node.seconds.or(node.last_seconds).map_or_else(String::new, |s| format!("{s:.1} s"));
        let folder = node.fingerprint.as_deref().map_or("", |f| &f[..12]);
        let estimate = node.estimate.to_string();
        table.add_row([&node.name, &node.kind, &node.reads.join(", "), &state, &seconds, &estimate, folder]);
    }
    let will_run = nodes.iter().filter(|n| matches!(n.state, State::WillRun { .. })).count();
    format!("{table}\n{} cached, {will_run} will run", nodes.len() - will_run)
}

/// What tonight will take beside what the last night took, from recorded rates.
fn cost(pipeline: &Pipeline, nodes: &[PlannedNode], runs: &[RunEntry]) -> String {
    let tonight = Cost::tonight(nodes, &pipeline.name, runs);
    let unknown = match tonight.unknown {
        0 => String::new(),
        n => format!("; {n} stages have never run here, so their time is not in it"),
    };
    let last = match Cost::last_night(&pipeline.name, runs) {
        Some((run_id, cost)) => format!("last night: {cost} ({run_id})"),
        None => "last night: nothing is recorded yet".to_owned(),
    };
    format!("tonight:    {tonight}{unknown}\n{last}")
}
