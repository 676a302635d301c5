//! `tailfuse schema`: JSON Schema of the pipeline file and the generated references.

use clap::Args;

use super::printer::Printer;
use crate::error::{Error, Result};

/// Arguments of `schema`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  tailfuse schema > tailfuse.schema.json\n  tailfuse schema --markdown > docs/pipeline.md"
)]
pub struct SchemaArgs {
    /// The pipeline reference (`docs/pipeline.md`) instead.
    #[arg(long)]
    markdown: bool,
    /// The table reference (`docs/tables.md`) instead.
    #[arg(long, conflicts_with = "markdown")]
    tables: bool,
}

/// Prints it on stdout.
pub fn main(args: SchemaArgs, printer: &Printer) -> Result<()> {
    let text = if args.markdown {
        crate::pipeline::reference_docs::pipeline_markdown()
    } else if args.tables {
        crate::tables::schemas::tables_markdown()
    } else {
        serde_json::to_string_pretty(&crate::pipeline::json_schema())
            .map_err(|e| Error::internal("schema as JSON").because(e))?
    };
    printer.data(text.trim_end());
    Ok(())
}
