//! `tailfuse init`: a first pipeline from the user's own files.

use std::path::PathBuf;

use clap::Args;

use super::key_value;
use super::printer::Printer;
use crate::error::{Error, Result};
use crate::pipeline::init::{Drafted, InitOptions, init};
use crate::pipeline::nodes::Surroundings;
use crate::pipeline::{LoadOptions, check, load_text};

/// Arguments of `init`.
#[derive(Debug, Args)]
#[command(after_help = "\
Looks at the files, says which column it takes for what and why, and writes a pipeline that validates and runs.

Examples:
  tailfuse init --interactions data/sample/events.csv --items data/sample/films.csv
  tailfuse init --interactions s3://warehouse/events/ --map user_id=member --out pipelines/club.toml --llm none")]
pub struct InitArgs {
    /// The log, one row for what a user did with an item: a Parquet or CSV file, or a folder of them.
    #[arg(long, value_name = "PATH")]
    interactions: String,
    /// The item table, one row an item, with a title where there is one.
    #[arg(long, value_name = "PATH")]
    items: Option<String>,
    /// Settles what a column means, e.g. `--map user_id=member`. Ours: user_id, item_id, rating, timestamp, title.
    #[arg(long = "map", value_name = "OURS=THEIRS", value_parser = key_value)]
    map: Vec<(String, String)>,
    /// Where the pipeline goes; `-` prints it.
    #[arg(long, value_name = "FILE", default_value = "pipelines/mine.toml")]
    out: PathBuf,
    /// The LLM that is asked where items have a title: a name of the catalogue, a path, or `none`.
    #[arg(long, value_name = "MODEL", default_value = "smollm2-135m-instruct")]
    llm: String,
    /// Replace a file that is there.
    #[arg(long)]
    force: bool,
}

/// Looks, guesses, writes; the guesses are on stderr, the file's name is the last line of stdout.
pub async fn main(args: InitArgs, printer: &Printer) -> Result<()> {
    let prints = args.out.as_os_str() == "-";
    let out = if prints { PathBuf::from("pipelines/mine.toml") } else { args.out };
    if !prints && !args.force && out.exists() {
        return Err(Error::usage(format!("{} is there already", out.display()))
            .with_help("name another file with --out, or replace it with --force"));
    }
    let folder = std::env::current_dir().map_err(|e| Error::environment("there is no working folder").because(e))?;
    let options = InitOptions {
        interactions: args.interactions,
        items: args.items,
        map: args.map.into_iter().collect(),
        out: out.clone(),
        llm: Some(args.llm).filter(|l| l != "none"),
        folder,
        day: chrono::Utc::now().format("%Y-%m-%d").to_string(),
    };
    let drafted = init(&options).await?;
    tell(&drafted, printer);
    if prints {
        printer.data(drafted.text.trim_end());
        return Ok(());
    }
    if let Some(parent) = out.parent() {
        fs_err::create_dir_all(parent).map_err(|e| Error::environment("cannot make the folder").because(e))?;
    }
    fs_err::write(&out, &drafted.text).map_err(|e| Error::environment("cannot write the pipeline").because(e))?;
    let wrong = |e: Error| e.at(format!("{} is written, but does not fit yet", out.display()));
    let pipeline = load_text(drafted.text, &out, &LoadOptions::default()).map_err(wrong)?;
    check::check(&pipeline, &Surroundings::of(&pipeline)?).await.map_err(wrong)?;
    printer.say(&format!("\nIt validates. Next:\n  tailfuse plan {0}\n  tailfuse run {0}", out.display()));
    printer.data(&out.display().to_string());
    Ok(())
}

fn tell(drafted: &Drafted, printer: &Printer) {
    for note in &drafted.guess.notes {
        printer.say(note);
    }
    for table in ["interactions", "items"] {
        let findings: Vec<_> = drafted.guess.findings.iter().filter(|f| f.table == table).collect();
        if findings.is_empty() {
            continue;
        }
        printer.say(&format!("\n{table}:"));
        for finding in findings {
            let theirs = finding.theirs.as_deref().unwrap_or("-");
            let unsure = if finding.sure { "" } else { "  [unsure]" };
            printer.say(&format!("  {:<9} = {theirs}{unsure}  ({})", finding.ours, finding.why));
        }
    }
    let unsure: Vec<&str> = drafted.guess.findings.iter().filter(|f| !f.sure).map(|f| f.ours).collect();
    if !unsure.is_empty() {
        let settled = unsure.first().copied().unwrap_or_default();
        printer.say(&format!("\nUnsure of {}: settle it with --map {settled}=COLUMN", unsure.join(", ")));
    }
}
