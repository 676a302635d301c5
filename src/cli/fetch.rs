//! `tailfuse fetch`: data sets and models of the catalogue, by name.

use std::path::{Path, PathBuf};

use clap::Args;

use super::printer::Printer;
use super::progress::NodeProgress;
use crate::catalog::{Catalog, FetchProgress, cache_folder};
use crate::error::Result;
use crate::stages::Observer;

/// Arguments of `fetch`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tailfuse fetch ml-100k smollm2-135m-instruct")]
pub struct FetchArgs {
    /// Names from the catalogue; without any, lists what there is.
    names: Vec<String>,
    /// Folder that `data/cache` lies in; `TAILFUSE_CACHE` names another cache folder.
    #[arg(long, default_value = ".", value_name = "FOLDER")]
    root: PathBuf,
}

/// Progress of a download on the terminal.
pub struct FetchBar<'a> {
    printer: &'a Printer,
    bar: NodeProgress,
}

impl<'a> FetchBar<'a> {
    /// For one entry.
    pub fn new(printer: &'a Printer, name: &str) -> Self {
        FetchBar { printer, bar: NodeProgress::new(printer, format!("fetch {name}")) }
    }
}

impl Drop for FetchBar<'_> {
    fn drop(&mut self) {
        self.bar.clear();
    }
}

impl FetchProgress for FetchBar<'_> {
    fn begin(&self, _name: &str, total_bytes: Option<u64>) {
        self.bar.begin("bytes", total_bytes.unwrap_or(0));
    }
    fn advance(&self, bytes: u64) {
        self.bar.advance(bytes);
    }
    fn line(&self, text: &str) {
        self.printer.say(text);
    }
}

/// Fetches each, or lists the catalogue.
pub async fn main(args: FetchArgs, printer: &Printer) -> Result<()> {
    let catalog = Catalog::load()?;
    let cache = cache_folder(Path::new(&args.root));
    if args.names.is_empty() {
        printer.data(&catalog.listing(&cache));
        return Ok(());
    }
    // A wrong name is said before anything is fetched.
    for name in &args.names {
        catalog.entry(name)?;
    }
    for name in &args.names {
        let bar = FetchBar::new(printer, name);
        let folder = catalog.ensure(name, &cache, &bar).await?;
        drop(bar);
        printer.data(&format!("{name}\t{}", folder.display()));
    }
    Ok(())
}
