//! Data sets and models by name: where they come from, and how a copy is known to be the right one.
//!
//! In: `data/catalog.toml` (compiled in; another file by `TAILFUSE_CATALOG`) and a cache folder.
//! Out: files in that folder whose sha256 has been checked, as a [`Fetched`] or a [`ModelFile`].
//! What is there already is used at once, without the network.

mod archive;
mod digest;
mod download;
mod fetch;
mod marker;
mod model;
mod movielens;
mod place;
mod spec;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

pub use digest::{sha256_bytes, sha256_file};
pub use fetch::{FetchProgress, Fetched, Quiet};
pub use model::ModelFile;
pub use spec::{Entry, EntryKind, Layout, Member, Source, SourceKind, TableSpec, WeightsSpec};

use crate::error::{Error, Result};

/// Scheme of a source that names a table of the catalogue: `catalog:ml-100k/interactions`.
pub const SCHEME: &str = "catalog:";

/// The catalogue that is compiled in.
const BUILT_IN: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/data/catalog.toml"));

/// All entries by name.
#[derive(Clone, Debug)]
pub struct Catalog {
    entries: BTreeMap<String, Entry>,
    /// How messages call the file that the entries were read from.
    origin: String,
    /// The Python whose pip downloads wheels.
    python: OsString,
}

/// A table of a data set, as `DATASET/TABLE` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableRef {
    /// The entry.
    pub dataset: String,
    /// The table in it.
    pub table: String,
}

impl Catalog {
    /// The catalogue that `TAILFUSE_CATALOG` names, else the one that is compiled in.
    /// Errors (exit 78): the file is missing or is no catalogue.
    pub fn load() -> Result<Catalog> {
        let catalog = match std::env::var_os("TAILFUSE_CATALOG") {
            None => Catalog::parse(BUILT_IN, "the built-in catalogue")?,
            Some(path) => {
                let text = fs_err::read_to_string(PathBuf::from(&path)).map_err(|e| {
                    Error::spec("cannot read the catalogue that TAILFUSE_CATALOG names")
                        .because(e)
                        .with_help("unset TAILFUSE_CATALOG to use the built-in catalogue")
                })?;
                Catalog::parse(&text, &PathBuf::from(path).display().to_string())?
            }
        };
        Ok(match std::env::var_os("TAILFUSE_PYTHON") {
            Some(python) => catalog.with_python(python),
            None => catalog,
        })
    }

    /// A catalogue from its text; `origin` is how messages call it.
    /// Errors (exit 78): bad TOML, an unknown key, an entry that contradicts itself.
    pub fn parse(text: &str, origin: &str) -> Result<Catalog> {
        let entries: BTreeMap<String, Entry> =
            toml::from_str(text).map_err(|e| Error::spec(format!("{origin} is not a catalogue")).because(e))?;
        for (name, entry) in &entries {
            entry.check(name).map_err(|what| Error::spec(format!("{origin}: entry `{name}`: {what}")))?;
        }
        Ok(Catalog { entries, origin: origin.to_owned(), python: OsString::from("python3") })
    }

    /// The same catalog with another Python for pip (`python3` by default; `TAILFUSE_PYTHON` in [`Catalog::load`]).
    pub fn with_python(mut self, python: impl Into<OsString>) -> Catalog {
        self.python = python.into();
        self
    }

    /// Names and entries, sorted by name.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// Whether there is an entry of that name.
    pub fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The entry of that name. Error (exit 78) names the nearest one.
    pub fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| {
            let all: Vec<&str> = self.entries.keys().map(String::as_str).collect();
            Error::spec(format!("{} has no entry `{name}`", self.origin)).with_help(suggestion(name, &all))
        })
    }

    /// The table that `DATASET/TABLE` names (`catalog:` in front of it or not), checked against the entries.
    /// Errors (exit 78): no such data set or table, or a model in its place.
    pub fn table_ref(&self, uri: &str) -> Result<TableRef> {
        let rest = uri.strip_prefix(SCHEME).unwrap_or(uri);
        let (dataset, table) = rest.split_once('/').unwrap_or((rest, ""));
        let entry = self.entry(dataset)?;
        if entry.kind != EntryKind::Dataset {
            return Err(Error::spec(format!("`{uri}`: `{dataset}` is a model, not a data set"))
                .with_help("name a model in a stage's `model` key, and a data set in a source"));
        }
        if !entry.tables.contains_key(table) {
            let all: Vec<&str> = entry.tables.keys().map(String::as_str).collect();
            let what = match table {
                "" => format!("`{uri}` names no table of the data set `{dataset}`"),
                _ => format!("`{uri}`: the data set `{dataset}` has no table `{table}`"),
            };
            return Err(
                Error::spec(what).with_help(format!("{}; write {SCHEME}{dataset}/TABLE", suggestion(table, &all)))
            );
        }
        Ok(TableRef { dataset: dataset.to_owned(), table: table.to_owned() })
    }
}

/// The cache folder of a pipeline whose root is `root`: `TAILFUSE_CACHE`, else `data/cache` below the root.
pub fn cache_folder(root: &Path) -> PathBuf {
    match std::env::var_os("TAILFUSE_CACHE") {
        Some(folder) if !folder.is_empty() => PathBuf::from(folder),
        _ => root.join("data").join("cache"),
    }
}

/// `did you mean ...?`, or all there is.
fn suggestion(name: &str, all: &[&str]) -> String {
    let nearest = all
        .iter()
        .map(|c| (strsim::damerau_levenshtein(name, c), *c))
        .filter(|(distance, c)| *distance <= c.len().max(name.len()) / 2)
        .min();
    let quoted: Vec<String> = all.iter().map(|c| format!("`{c}`")).collect();
    match nearest {
        Some((_, near)) if !name.is_empty() => format!("did you mean `{near}`? There is: {}", quoted.join(", ")),
        _ => format!("there is: {}", quoted.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Fault;

    #[test]
    fn the_built_in_catalog_parses_and_has_what_the_demo_names() {
        let catalog = Catalog::parse(BUILT_IN, "the built-in catalogue").unwrap();
        let names: Vec<&str> = catalog.entries().map(|(n, _)| n).collect();
        assert_eq!(names, ["ml-100k", "smollm2-135m-instruct"]);
        let data = catalog.entry("ml-100k").unwrap();
        assert_eq!(data.tables.keys().collect::<Vec<_>>(), ["interactions", "items", "users"]);
        // The official address comes before the package index.
        let kinds: Vec<SourceKind> = data.sources.iter().map(|s| s.kind).collect();
        assert_eq!(kinds, [SourceKind::Http, SourceKind::Pip]);
    }

    #[test]
    fn an_unknown_entry_names_the_nearest() {
        let catalog = Catalog::parse(BUILT_IN, "the built-in catalogue").unwrap();
        let error = catalog.entry("ml100k").unwrap_err();
        assert_eq!(error.fault, Fault::Spec);
        insta::assert_snapshot!(error.to_string(), @r"
        the built-in catalogue has no entry `ml100k`
          help: did you mean `ml-100k`? There is: `ml-100k`, `smollm2-135m-instruct`
        ");
    }

    #[test]
    fn table_references_are_checked() {
        let catalog = Catalog::parse(BUILT_IN, "the built-in catalogue").unwrap();
        let found = catalog.table_ref("catalog:ml-100k/items").unwrap();
        assert_eq!((found.dataset.as_str(), found.table.as_str()), ("ml-100k", "items"));
        assert_eq!(catalog.table_ref("ml-100k/items").unwrap(), found);
        for wrong in ["catalog:ml-100k", "catalog:ml-100k/item", "catalog:smollm2-135m-instruct/x", "catalog:ml-1m/x"] {
            let error = catalog.table_ref(wrong).unwrap_err();
            assert_eq!(error.fault, Fault::Spec, "{wrong}");
            assert!(error.help.is_some(), "{wrong}");
        }
        let error = catalog.table_ref("catalog:ml-100k/item").unwrap_err();
        assert!(error.to_string().contains("did you mean `items`?"), "{error}");
    }

    #[test]
    fn entries_that_contradict_themselves_are_refused() {
        let sha = "a".repeat(64);
        let good = format!(
            "[m]\nkind = \"model\"\nabout = \"x\"\nlicence = \"MIT\"\nlicence_url = \"https://x\"\n\
             [m.weights]\nfile = \"m.gguf\"\nbytes = 3\nsha256 = \"{sha}\"\n\
             [[m.sources]]\nkind = \"http\"\nurl = \"https://x/m.gguf\"\nfile = \"m.gguf\"\nbytes = 3\nsha256 = \"{sha}\"\nlayout = \"as-is\"\n"
        );
        assert!(Catalog::parse(&good, "t").is_ok());
        for (from, to, expected) in [
            ("https://x/m.gguf\"\n", "https://x/m.gguf\"\npackage = \"p\"\n", "`package`"),
            ("url = \"https://x/m.gguf\"\n", "", "`url`"),
            (&sha[..], "abc", "64"),
            ("file = \"m.gguf\"", "file = \"../m.gguf\"", "file name"),
            ("layout = \"as-is\"", "layout = \"movielens-100k\"", "as-is"),
            ("about = \"x\"", "about = \"x\"\nshape = 1", "shape"),
            ("[m]", "[\"../m\"]", "name"),
        ] {
            let bad = good.replace(from, to).replace("[m.", if from == "[m]" { "[\"../m\"." } else { "[m." });
            let bad = if from == "[m]" { bad.replace("[[m.", "[[\"../m\".") } else { bad };
            let error = Catalog::parse(&bad, "t").unwrap_err();
            assert_eq!(error.fault, Fault::Spec);
            assert!(error.to_string().contains(expected), "{expected}: {error}");
        }
    }
}
