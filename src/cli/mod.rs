//! The command line: argument types, output, exit codes; no logic.
//!
//! In: arguments. Out: calls into the pipeline and below; stdout carries data and the one result
//! document, stderr the talk. One file per verb; a verb is a variant of [`Verb`] and a file.

pub mod fetch;
pub mod gc;
pub mod init;
pub mod llm;
pub mod log;
pub mod plan;
pub mod printer;
pub mod progress;
pub mod restore;
pub mod result_document;
pub mod run;
pub mod schema;
pub mod sql;
pub mod test;
pub mod validate;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::error::{Error, Result};
use crate::pipeline::LoadOptions;
use printer::Printer;

/// Batch recommendation pipelines: a conventional recommender and an LLM, fused per user.
#[derive(Debug, Parser)]
#[command(name = "tailfuse", version, max_term_width = 100, propagate_version = true)]
pub struct Cli {
    /// More talk on stderr: -v for details, -vv for everything.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
    /// No progress on stderr; errors are still shown.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// How lines on stderr look: `json` has one object a line, for log collectors.
    #[arg(long, global = true, value_enum, default_value = "text", env = "TAILFUSE_LOG_FORMAT")]
    pub log_format: log::LogFormat,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Run a pipeline; what is cached is not run again.
    Run(run::RunArgs),
    /// Show the DAG of a pipeline: what is cached and what will run.
    Plan(plan::PlanArgs),
    /// Check a pipeline file without running anything.
    Validate(validate::ValidateArgs),
    /// Ask sources, stage outputs and published tables in SQL (read only).
    Sql(sql::SqlArgs),
    /// Bring a published Delta table back to an earlier version.
    #[command(disable_version_flag = true)]
    Restore(restore::RestoreArgs),
    /// Remove artifacts that no run needs any more.
    Gc(gc::GcArgs),
    /// Fetch data sets and models of the catalogue into the cache.
    Fetch(fetch::FetchArgs),
    /// Write a first pipeline from your own files.
    Init(init::InitArgs),
    /// Run the `[[test]]` blocks of a pipeline: rows in, rows expected.
    Test(test::TestArgs),
    /// Print the JSON Schema of the pipeline file, or the generated references.
    Schema(schema::SchemaArgs),
    /// Check or debug a model: one JSON request per line in, one JSON answer per line out.
    Llm(llm::LlmArgs),
}

/// A pipeline file and what replaces parts of it.
#[derive(Clone, Debug, Args)]
pub struct PipelineArgs {
    /// The pipeline file (TOML).
    pub pipeline: PathBuf,
    /// Value of a parameter, e.g. `--param ds=2026-11-22`.
    #[arg(long = "param", value_name = "NAME=VALUE", value_parser = key_value)]
    pub params: Vec<(String, String)>,
    /// Replaces one key of the file, e.g. `--set lightgcn.hyper.layers=2`.
    #[arg(long = "set", value_name = "STAGE.KEY=VALUE", value_parser = key_value)]
    pub sets: Vec<(String, String)>,
}

/// What a pipeline file may name.
#[derive(Clone, Debug, Default, Args)]
pub struct Sandbox {
    /// For a file from somebody else: refuses it where a local path in it, or its root, leaves DIR (here by default),
    /// by `..`, by an absolute path or by a symbolic link.
    #[arg(long, value_name = "DIR", num_args = 0..=1, require_equals = true, default_missing_value = ".")]
    pub sandbox: Option<PathBuf>,
}

impl PipelineArgs {
    /// Parses and checks the file.
    pub fn load(&self) -> Result<crate::pipeline::Pipeline> {
        self.load_within(&Sandbox::default())
    }

    /// The same; with `--sandbox`, every local path that it names must lie below a folder.
    pub fn load_within(&self, sandbox: &Sandbox) -> Result<crate::pipeline::Pipeline> {
        let sandbox = sandbox.sandbox.as_deref();
        let options = LoadOptions { params: &self.params, sets: &self.sets, sandbox, ..LoadOptions::default() };
        crate::pipeline::load_with(&self.pipeline, &options)
    }
}

fn key_value(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => Ok((key.trim().to_owned(), value.to_owned())),
        _ => Err("write it as NAME=VALUE".to_owned()),
    }
}

/// Runs the verb to its end. The runtime starts here and not in `main.rs`, so that the asynchronous
/// code is compiled once, with the library.
pub fn execute(cli: Cli, printer: &Printer) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::environment("cannot start the worker threads").because(e))?;
    let done = runtime.block_on(dispatch(cli, printer));
    // What a stop request left behind on a worker thread must not hold the process.
    runtime.shutdown_background();
    done
}

async fn dispatch(cli: Cli, printer: &Printer) -> Result<()> {
    match cli.verb {
        Verb::Run(args) => run::main(args, printer).await,
        Verb::Plan(args) => plan::main(args, printer).await,
        Verb::Validate(args) => validate::main(args, printer).await,
        Verb::Sql(args) => sql::main(args, printer).await,
        Verb::Restore(args) => restore::main(args, printer).await,
        Verb::Gc(args) => gc::main(args, printer).await,
        Verb::Fetch(args) => fetch::main(args, printer).await,
        Verb::Init(args) => init::main(args, printer).await,
        Verb::Test(args) => test::main(args, printer).await,
        Verb::Schema(args) => schema::main(args, printer),
        Verb::Llm(args) => llm::main(args, printer).await,
    }
}
