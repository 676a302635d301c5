//! A first pipeline from the user's own files: what `tailfuse init` does.
//!
//! In: a log, perhaps an item table, and what the user knows better (`--map`). Out: the text of a pipeline file that
//! loads, validates and runs, and every guess with its reason. `columns` looks, `guess` decides, `draft` writes.

pub mod columns;
pub mod draft;
pub mod guess;
pub mod words;

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};
use columns::look;
use draft::{Choices, draft};
use guess::{Guess, guess};

/// What a user asks of `init`.
pub struct InitOptions {
    /// The log: a path or URI, relative to `folder`.
    pub interactions: String,
    /// The item table.
    pub items: Option<String>,
    /// Our column -> theirs, where the user says so.
    pub map: BTreeMap<String, String>,
    /// Where the pipeline file will lie, relative to `folder`.
    pub out: PathBuf,
    /// The LLM; `None` for a pipeline without one.
    pub llm: Option<String>,
    /// The working folder, absolute.
    pub folder: PathBuf,
    /// Value of the parameter `ds`.
    pub day: String,
}

/// A pipeline that is not written yet.
pub struct Drafted {
    /// Text of the pipeline file.
    pub text: String,
    /// What was guessed.
    pub guess: Guess,
}

/// Looks at the files and drafts a pipeline. Errors: files that cannot be read or made sense of (exit 65), `--map` that
/// names a column which is not there (exit 2).
pub async fn init(options: &InitOptions) -> Result<Drafted> {
    let log = look("--interactions", &options.interactions, &options.folder).await?;
    let items = match &options.items {
        Some(uri) => Some(look("--items", uri, &options.folder).await?),
        None => None,
    };
    let guess = guess(&log, items.as_ref(), &options.map)?;
    let stem = options.out.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let name = pipeline_name(&stem);
    let root = root_for(&options.out, &options.folder)?;
    let file = options.out.display().to_string();
    let choices = Choices { name: &name, root: &root, day: &options.day, llm: options.llm.as_deref(), file: &file };
    let text = draft(&log, items.as_ref(), &guess, &choices);
    Ok(Drafted { text, guess })
}

/// The stem of the file as a pipeline's name.
fn pipeline_name(stem: &str) -> String {
    let word = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.') { c } else { '_' };
    let name: String = stem.chars().map(word).collect();
    match name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        true => name,
        false => format!("p{name}"),
    }
}

/// The working folder as seen from the folder of the pipeline file, so that the paths in it are those that the user typed.
fn root_for(out: &Path, folder: &Path) -> Result<String> {
    let parent = out.parent().unwrap_or(Path::new(""));
    let plain = parent.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
    if plain {
        let depth = parent.components().filter(|c| matches!(c, Component::Normal(_))).count();
        return Ok(if depth == 0 { ".".to_owned() } else { vec![".."; depth].join("/") });
    }
    let folder = folder.to_str();
    folder.map(str::to_owned).ok_or_else(|| Error::usage("the working folder's name is no UTF-8 text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_lead_back_to_the_working_folder() {
        let root = |out: &str| root_for(Path::new(out), Path::new("/srv/here")).unwrap();
        assert_eq!(root("mine.toml"), ".");
        assert_eq!(root("./mine.toml"), ".");
        assert_eq!(root("pipelines/mine.toml"), "..");
        assert_eq!(root("a/b/mine.toml"), "../..");
        assert_eq!(root("/tmp/mine.toml"), "/srv/here");
        assert_eq!(root("../mine.toml"), "/srv/here");
        assert_eq!(pipeline_name("my films"), "my_films");
        assert_eq!(pipeline_name("_x"), "p_x");
    }
}
