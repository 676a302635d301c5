//! The binary: parses arguments, runs a verb, turns errors into exit codes. Nothing else exits.

use std::process::ExitCode;

use clap::Parser;
use tailfuse::cli::printer::Printer;
use tailfuse::cli::{Cli, execute};
use tailfuse::error::Error;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let printer = Printer::new(cli.quiet, cli.log_format);
    printer.log().listen(cli.verbose);
    let run = std::panic::AssertUnwindSafe(|| execute(cli, &printer));
    // A panic is our bug, and has its own exit code; the hook has printed where it was.
    let outcome = std::panic::catch_unwind(run).unwrap_or_else(|_| Err(Error::internal("tailfuse stopped at a panic")));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            printer.error(&error);
            ExitCode::from(error.fault.exit_code())
        }
    }
}
