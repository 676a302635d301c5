//! `tailfuse validate`: check a pipeline file without running anything.

use clap::Args;

use super::printer::Printer;
use super::{PipelineArgs, Sandbox};
use crate::error::Result;
use crate::pipeline::check;
use crate::pipeline::nodes::Surroundings;

/// Arguments of `validate`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tailfuse validate pipelines/demo.toml --param ds=2026-11-22")]
pub struct ValidateArgs {
    #[command(flatten)]
    pipeline: PipelineArgs,
    #[command(flatten)]
    sandbox: Sandbox,
}

/// Prints what was checked; errors end with exit 78 (65 where the data does not fit).
pub async fn main(args: ValidateArgs, printer: &Printer) -> Result<()> {
    let pipeline = args.pipeline.load_within(&args.sandbox)?;
    let around = Surroundings::of(&pipeline)?;
    let checked = check::check(&pipeline, &around).await?;
    for line in &checked.lines {
        printer.say(line);
    }
    printer.data(&format!(
        "{}: valid ({} sources, {} stages, {} table schemas checked)",
        pipeline.name,
        pipeline.sources.len(),
        pipeline.stages.len(),
        checked.schemas
    ));
    Ok(())
}
