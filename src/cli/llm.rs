//! `tailfuse llm`: one JSON request per line of stdin, one JSON answer per line of stdout.

use std::path::PathBuf;

use clap::Args;

use super::fetch::FetchBar;
use super::printer::Printer;
use crate::catalog::{Catalog, cache_folder};
use crate::device::DeviceChoice;
use crate::error::{Error, Result};
use crate::llm::{Llm, LlmOptions, Precision, serve::serve};

/// Arguments of `llm`.
#[derive(Debug, Args)]
#[command(after_help = "\
Requests:
  {\"op\":\"tokenize\",\"text\":\"Toy Story\",\"special\":false}
  {\"op\":\"decode\",\"ids\":[1,2]}
  {\"op\":\"chat\",\"messages\":[{\"role\":\"user\",\"content\":\"Hello\"}]}
  {\"op\":\"logits\",\"text\":\"Hello\",\"top\":20,\"probe\":[1,2]}
  {\"op\":\"score\",\"ids\":[1,2],\"continuations\":[[3],[4,5]]}
  {\"op\":\"generate\",\"text\":\"Hello\",\"max_new\":32}
  {\"op\":\"labels\",\"text\":\"Answer:\",\"labels\":[330,389],\"among\":true}
  {\"op\":\"rank\",\"text\":\"Best first:\",\"titles\":[\"Alien\",\"Aliens\"],\"numbered\":false}
  {\"op\":\"rate\",\"text\":\"Rating:\",\"ratings\":[1,2,3,4,5]}
  {\"op\":\"hidden\",\"text\":\"Toy Story\"}
  {\"op\":\"memory\"}

Example:
  echo '{\"op\":\"logits\",\"text\":\"The\",\"top\":3}' | tailfuse llm --model smollm2-135m-instruct")]
pub struct LlmArgs {
    /// A name from the catalogue, a GGUF file or a Hugging Face folder.
    #[arg(long, value_name = "PATH")]
    model: String,
    /// auto, cpu or cuda.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Linear layers on a CPU: auto, f32, int16 or int8.
    #[arg(long, default_value = "auto")]
    precision: String,
}

/// Serves until stdin ends.
pub async fn main(args: LlmArgs, printer: &Printer) -> Result<()> {
    let device: DeviceChoice = serde_json::from_value(serde_json::Value::String(args.device.clone()))
        .map_err(|_| Error::usage(format!("--device `{}` is not auto, cpu or cuda", args.device)))?;
    let precision: Precision = serde_json::from_value(serde_json::Value::String(args.precision.clone()))
        .map_err(|_| Error::usage(format!("--precision `{}` is not auto, f32, int16 or int8", args.precision)))?;
    let root = PathBuf::from(".");
    let cache = cache_folder(&root);
    let bar = FetchBar::new(printer, &args.model);
    let file = Catalog::load()?.resolve_model(&args.model, &root, &cache, &bar).await?;
    drop(bar);
    tokio::task::spawn_blocking(move || {
        let llm = Llm::open_with(&file.path, device, LlmOptions { precision, ..LlmOptions::default() })?;
        serve(&llm, std::io::stdin().lock(), std::io::stdout().lock())
    })
    .await?
}
