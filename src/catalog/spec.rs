//! What an entry of `data/catalog.toml` says.
//!
//! In: TOML. Out: [`Entry`], checked: nothing below has to ask again whether a key is there.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EntryKind {
    /// Tables, kept as Parquet under `datasets/NAME/`.
    Dataset,
    /// The weights of a language model, kept as they are under `models/NAME/`.
    Model,
}

/// How a source is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceKind {
    /// An address, `url`.
    Http,
    /// `package` and `version` on the package index that pip is configured for.
    Pip,
}

/// How the members of a source are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Layout {
    /// A member is the file that is wanted.
    #[serde(rename = "as-is")]
    AsIs,
    /// `u.data`, `u.item`, `u.user` of MovieLens 100K.
    #[serde(rename = "movielens-100k")]
    MovieLens100k,
    /// `.inter`, `.item`, `.user` of RecBole's copy of it.
    #[serde(rename = "recbole-ml-100k")]
    RecboleMl100k,
}

/// A file inside an archive.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Its path in the archive.
    pub path: String,
    /// sha256 (hex) of its content.
    pub sha256: String,
}

/// One place to get an entry from.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// How it is reached.
    pub kind: SourceKind,
    /// Address, for `http`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Package name, for `pip`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub package: Option<String>,
    /// Exact version, for `pip`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Name of the file that is downloaded; also its name under `downloads/` when placed there by hand.
    pub file: String,
    /// Its size in bytes, for the progress bar; a download of more than twice as much is stopped.
    pub bytes: u64,
    /// sha256 (hex) of the file that is downloaded.
    pub sha256: String,
    /// How its members are read.
    pub layout: Layout,
    /// Table name (data set) or `weights` (model) -> member of the archive. Empty where the file itself is the weights.
    #[serde(default)]
    pub members: BTreeMap<String, Member>,
}

impl Source {
    /// How messages call this source.
    pub fn label(&self) -> String {
        match (&self.url, &self.package, &self.version) {
            (Some(url), _, _) => url.clone(),
            (_, Some(package), Some(version)) => format!("pip {package}=={version}"),
            _ => self.file.clone(),
        }
    }
}

/// A table of a data set.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableSpec {
    /// Number of rows.
    pub rows: u64,
    /// sha256 (hex) of the content: one line per row in row order, columns separated by a tab, null as nothing.
    pub sha256: String,
}

/// The weights file of a model.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightsSpec {
    /// File name in the cache.
    pub file: String,
    /// Size in bytes.
    pub bytes: u64,
    /// sha256 (hex).
    pub sha256: String,
}

/// One data set or model.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Data set or model.
    pub kind: EntryKind,
    /// One line: what it is.
    pub about: String,
    /// The licence in a few words.
    pub licence: String,
    /// Where the licence can be read.
    pub licence_url: String,
    /// Said once, when the entry is first used on a machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice: Option<String>,
    /// The tables of a data set.
    #[serde(default)]
    pub tables: BTreeMap<String, TableSpec>,
    /// The weights of a model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<WeightsSpec>,
    /// Where to get it, in the order in which the places are tried.
    pub sources: Vec<Source>,
}

/// Name of a model's only member.
pub(super) const WEIGHTS: &str = "weights";

impl Entry {
    /// What is wrong with this entry, if anything.
    pub(super) fn check(&self, name: &str) -> Result<(), String> {
        if !is_file_name(name) {
            return Err(format!("the name `{name}` has characters other than letters, digits, `-`, `_` and `.`"));
        }
        if self.sources.is_empty() {
            return Err("it has no `sources`".into());
        }
        let wanted: Vec<&str> = match self.kind {
            EntryKind::Dataset if self.weights.is_some() => return Err("a data set has no `weights`".into()),
            EntryKind::Dataset if self.tables.is_empty() => return Err("a data set needs `tables`".into()),
            EntryKind::Dataset => self.tables.keys().map(String::as_str).collect(),
            EntryKind::Model if !self.tables.is_empty() => return Err("a model has no `tables`".into()),
            EntryKind::Model => vec![WEIGHTS],
        };
        for (table, spec) in &self.tables {
            file_name("table name", table)?;
            digest(&spec.sha256)?;
        }
        match (&self.weights, self.kind) {
            (Some(weights), _) => {
                file_name("file name", &weights.file)?;
                digest(&weights.sha256)?;
            }
            (None, EntryKind::Model) => return Err("a model needs `weights`".into()),
            (None, EntryKind::Dataset) => {}
        }
        for source in &self.sources {
            source.check(self.kind, &wanted).map_err(|what| format!("source `{}`: {what}", source.label()))?;
        }
        Ok(())
    }
}

impl Source {
    fn check(&self, kind: EntryKind, wanted: &[&str]) -> Result<(), String> {
        file_name("file name", &self.file)?;
        digest(&self.sha256)?;
        for member in self.members.values() {
            digest(&member.sha256)?;
        }
        match self.kind {
            SourceKind::Http if self.url.is_none() => return Err("an `http` source needs `url`".into()),
            SourceKind::Http if self.package.is_some() || self.version.is_some() => {
                return Err("an `http` source has no `package` or `version`".into());
            }
            SourceKind::Pip if self.package.is_none() || self.version.is_none() => {
                return Err("a `pip` source needs `package` and `version`".into());
            }
            SourceKind::Pip if self.url.is_some() => return Err("a `pip` source has no `url`".into()),
            SourceKind::Http | SourceKind::Pip => {}
        }
        match (kind, self.layout) {
            (EntryKind::Model, Layout::AsIs) if self.members.is_empty() && self.kind == SourceKind::Http => {
                return Ok(());
            }
            (EntryKind::Model, Layout::AsIs) => {}
            (EntryKind::Model, _) => return Err("a model's `layout` is `as-is`".into()),
            (EntryKind::Dataset, Layout::AsIs) => return Err("a data set needs a `layout` that makes tables".into()),
            (EntryKind::Dataset, Layout::MovieLens100k | Layout::RecboleMl100k) => {}
        }
        let there: Vec<&str> = self.members.keys().map(String::as_str).collect();
        if there != wanted {
            return Err(format!("`members` are {}, {} are wanted", there.join(", "), wanted.join(", ")));
        }
        Ok(())
    }
}

/// Entry and file names become paths in the cache, so they may not lead out of it.
fn is_file_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+'))
}

fn file_name(what: &str, name: &str) -> Result<(), String> {
    match is_file_name(name) {
        true => Ok(()),
        false => Err(format!("the {what} `{name}` has characters other than letters, digits, `-`, `_`, `+` and `.`")),
    }
}

fn digest(sha256: &str) -> Result<(), String> {
    match sha256.len() == 64 && sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        true => Ok(()),
        false => Err(format!("`{sha256}` is no sha256: 64 lower-case hexadecimal digits are wanted")),
    }
}
