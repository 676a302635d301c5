//! The binary: parses arguments, runs a verb, turns errors into exit codes. Nothing else exits.

use std::process::ExitCode;

use clap::Parser;
use tailfuse::cli::printer::Printer;
use tailfuse::cli::{Cli, execute};
use tailfuse::error::{Error, Fault};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let printer = Printer::new(cli.quiet);
    start_log(cli.verbose);
    let run = std::panic::AssertUnwindSafe(|| execute(cli, &printer));
    // A panic is our bug, and has its own exit code; the hook has printed where it was.
    let outcome = std::panic::catch_unwind(run).unwrap_or_else(|_| Err(Error::internal("tailfuse stopped at a panic")));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            match error.fault {
                Fault::NothingToDo => printer.always(&format!("nothing to do: {error}")),
                _ => printer.always(&format!("error: {error}")),
            }
            if error.fault == Fault::Internal {
                printer.always("  This is a bug in tailfuse. Please report it with the command and the lines above.");
            }
            ExitCode::from(error.fault.exit_code())
        }
    }
}

/// Plain log lines on stderr; `RUST_LOG` overrides the flags.
fn start_log(verbose: u8) {
    let level = match verbose {
        0 => "error",
        1 => "tailfuse=info",
        _ => "debug",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    // A second subscriber cannot be set; there is none at this point.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}
