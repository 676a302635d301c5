//! `tailfuse test`: run the `[[test]]` blocks of a pipeline.

use clap::Args;

use super::PipelineArgs;
use super::printer::Printer;
use crate::error::{Error, Fault, Result};
use crate::pipeline::nodes::Surroundings;
use crate::pipeline::unit_tests;

/// Arguments of `test`.
#[derive(Debug, Args)]
#[command(after_help = "\
A test is a block of the pipeline file: a stage, rows in, rows expected. Nothing but that stage runs, on those rows.

Examples:
  tailfuse test pipelines/demo.toml
  tailfuse test pipelines/demo.toml --only \"unknown items are dropped\"")]
pub struct TestArgs {
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// Only tests whose name, or the name of whose stage, contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

/// A line for each test on stdout, with its differences; exit 1 where one failed.
pub async fn main(args: TestArgs, printer: &Printer) -> Result<()> {
    let pipeline = args.pipeline.load()?;
    let around = Surroundings::of(&pipeline)?;
    let wanted = |name: &str, stage: &str| args.only.as_ref().is_none_or(|o| name.contains(o) || stage.contains(o));
    let tests: Vec<_> = pipeline.tests.iter().filter(|t| wanted(&t.name, &t.stage)).collect();
    if tests.is_empty() {
        let what = if pipeline.tests.is_empty() { "no `[[test]]` block" } else { "no test of that name" };
        return Err(Error::usage(format!("{} has {what}", pipeline.file.display()))
            .with_help("docs/pipeline.md shows how one is written"));
    }
    let mut failed = 0;
    for test in &tests {
        match unit_tests::run(&pipeline, &around, test).await {
            Ok(outcome) if outcome.mistakes.is_empty() => {
                printer.data(&format!("ok      {}  ({}, {} rows)", test.name, test.stage, outcome.rows));
            }
            Ok(outcome) => {
                failed += 1;
                printer.data(&format!("FAILED  {}  ({})", test.name, test.stage));
                for mistake in &outcome.mistakes {
                    printer.data(&format!("  {mistake}"));
                }
            }
            // A stage that refuses the rows fails its test; what may come back another time is no verdict.
            Err(e) if !e.fault.retryable() && e.fault != Fault::Internal => {
                failed += 1;
                printer.data(&format!("FAILED  {}  ({})\n  {e}", test.name, test.stage));
            }
            Err(e) => return Err(e),
        }
    }
    match failed {
        0 => {
            printer.say(&format!("{} passed", tests.len()));
            Ok(())
        }
        n => Err(Error::new(Fault::Tests, format!("{n} of {} tests failed", tests.len()))),
    }
}
