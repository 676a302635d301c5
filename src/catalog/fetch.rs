//! From an entry to files in the cache.
//!
//! In: an entry's name and the cache folder. Out: a [`Fetched`], whose files were checked by sha256 now or earlier.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::Catalog;
use super::archive::{extract_member, read_member};
use super::digest::sha256_bytes;
use super::download::{Attempt, download};
use super::marker::{Marker, State};
use super::movielens;
use super::place::{Place, cache_error, check_by_hand};
use super::spec::{Entry, EntryKind, Source, WEIGHTS};
use crate::error::{Error, Result};

/// Hears of a fetch. The terminal draws a bar, a log gets lines.
pub trait FetchProgress: Send + Sync {
    /// A file begins to arrive; its size in bytes, where that is known.
    fn begin(&self, file: &str, bytes: Option<u64>);
    /// `bytes` more have arrived.
    fn advance(&self, bytes: u64);
    /// Something a person would want to know (a licence notice, a source that failed); may have several lines.
    fn line(&self, text: &str);
}

/// A [`FetchProgress`] that says nothing.
pub struct Quiet;

impl FetchProgress for Quiet {
    fn begin(&self, _file: &str, _bytes: Option<u64>) {}
    fn advance(&self, _bytes: u64) {}
    fn line(&self, _text: &str) {}
}

/// An entry whose files are in the cache.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// Name of the entry.
    pub name: String,
    /// Data set or model.
    pub kind: EntryKind,
    /// The folder that holds its files.
    pub folder: PathBuf,
    /// Table name (data set) or `weights` (model) -> file.
    pub files: BTreeMap<String, PathBuf>,
    /// sha256 (hex) of the content: of the weights file, or over the tables' content digests. Does not
    /// depend on the source or on the Parquet writer.
    pub digest: String,
    /// The source that it came from.
    pub source: String,
    /// Whether it was in the cache already.
    pub cached: bool,
}

impl Catalog {
    /// Makes sure that the entry's files are in the cache and right, and says where they are.
    ///
    /// Errors: no such entry (exit 78); no source gave the right file (exit 75; the message has what each one said,
    /// and how to place a file by hand); a file that was placed by hand is not the right one (exit 65).
    pub async fn fetch(&self, name: &str, cache: &Path, progress: &dyn FetchProgress) -> Result<Fetched> {
        let entry = self.entry(name)?;
        let place = Place::new(cache, name, entry);
        place.notice_once(progress);
        if let State::Ready(marker) = Marker::look(&place.folder, &place.entry_digest).await? {
            return Ok(place.fetched(marker, true));
        }
        let _lock = place.lock(progress).await?;
        // Another process may have fetched it while this one waited.
        match Marker::look(&place.folder, &place.entry_digest).await? {
            State::Ready(marker) => return Ok(place.fetched(marker, true)),
            State::Stale(why) => progress.line(&format!("`{name}` is fetched again: {why}")),
            State::Missing => {
                if let Some(marker) = place.adopt().await? {
                    return Ok(place.fetched(marker, true));
                }
            }
        }
        let mut said = Vec::new();
        for source in &entry.sources {
            match self.attempt(&place, source, progress).await? {
                Attempt::Got(marker) => return Ok(place.fetched(marker, false)),
                Attempt::Failed(why) => {
                    progress.line(&format!("`{name}`: {}: {why}", source.label()));
                    said.push(format!("  {}: {why}", source.label()));
                }
            }
        }
        Err(place.nothing_answered(&said))
    }

    /// [`Catalog::fetch`], and the folder that the files are in.
    pub async fn ensure(&self, name: &str, cache: &Path, progress: &dyn FetchProgress) -> Result<PathBuf> {
        Ok(self.fetch(name, cache, progress).await?.folder)
    }

    /// The Parquet file of `DATASET/TABLE`, fetched if need be. Errors as in [`Catalog::fetch`] and [`Catalog::table_ref`].
    pub async fn ensure_table(&self, table: &str, cache: &Path, progress: &dyn FetchProgress) -> Result<PathBuf> {
        let wanted = self.table_ref(table)?;
        Ok(self.fetch(&wanted.dataset, cache, progress).await?.folder.join(table_file(&wanted.table)))
    }

    /// The Parquet file of `DATASET/TABLE` if it is in the cache; nothing is downloaded or hashed.
    /// Error (exit 78): there is no such table in the catalogue.
    pub fn fetched_table(&self, table: &str, cache: &Path) -> Result<Option<PathBuf>> {
        let wanted = self.table_ref(table)?;
        let place = Place::new(cache, &wanted.dataset, self.entry(&wanted.dataset)?);
        Ok(Marker::glance(&place.folder, &place.entry_digest).then(|| place.folder.join(table_file(&wanted.table))))
    }

    /// Where a model's weights are, or will be once they are fetched.
    pub(super) fn weights_path(&self, name: &str, cache: &Path) -> Result<PathBuf> {
        let entry = self.entry(name)?;
        match &entry.weights {
            Some(weights) => Ok(Place::new(cache, name, entry).folder.join(&weights.file)),
            None => Err(Error::spec(format!("`{name}` is a data set of the catalogue, not a model"))),
        }
    }

    /// All entries as lines of text: name, whether it is in the cache, what it is, licence.
    pub fn listing(&self, cache: &Path) -> String {
        let rows: Vec<[String; 4]> = self
            .entries()
            .map(|(name, entry)| {
                let place = Place::new(cache, name, entry);
                let there = Marker::glance(&place.folder, &place.entry_digest);
                let state = if there { "fetched" } else { "-" };
                [name.to_owned(), state.to_owned(), entry.about.clone(), entry.licence.clone()]
            })
            .collect();
        let width = |column: usize| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
        let (name, state) = (width(0), width(1));
        let lines: Vec<String> = rows
            .iter()
            .map(|[n, s, about, licence]| {
                format!("{n:name$}  {s:state$}  {about}\n{:1$}licence: {licence}", "", name + state + 4)
            })
            .collect();
        lines.join("\n")
    }

    /// One source, from the download to the finished folder.
    async fn attempt(
        &self,
        place: &Place<'_>,
        source: &Source,
        progress: &dyn FetchProgress,
    ) -> Result<Attempt<Marker>> {
        let work = place.fresh_work_folder()?;
        let by_hand = place.downloads.join(&source.file);
        let archive = match by_hand.is_file() {
            true => {
                check_by_hand(&by_hand, &source.sha256).await?;
                progress.line(&format!("`{}`: {} is used", place.name, by_hand.display()));
                by_hand
            }
            false => match download(source, &self.python, &work, progress).await? {
                Attempt::Got(path) => path,
                Attempt::Failed(why) => return Ok(Attempt::Failed(why)),
            },
        };
        let ready = work.join("ready");
        fs_err::create_dir_all(&ready).map_err(cache_error)?;
        let (entry, source_) = (place.entry.clone(), source.clone());
        let (from, to) = (archive, ready.clone());
        let filled = tokio::task::spawn_blocking(move || fill(&entry, &source_, &from, &to)).await??;
        if let Err(why) = filled {
            return Ok(Attempt::Failed(why));
        }
        let names: Vec<String> = place.entry.file_names().into_values().collect();
        let marker = Marker::of(&ready, &place.entry_digest, &source.label(), &names).await?;
        marker.write(&ready)?;
        place.commit(&ready)?;
        Ok(Attempt::Got(marker))
    }
}

/// Fills the folder `to` with an entry's files from a checked download.
fn fill(entry: &Entry, source: &Source, from: &Path, to: &Path) -> Result<Result<(), String>> {
    if let Some(weights) = &entry.weights {
        let target = to.join(&weights.file);
        let Some(member) = source.members.get(WEIGHTS) else {
            // The download itself is the weights file.
            fs_err::copy(from, &target).map_err(cache_error)?;
            return Ok(Ok(()));
        };
        if member.sha256 != weights.sha256 {
            return Ok(Err(format!(
                "the catalogue wants the sha256 {} of it and {} of the weights",
                member.sha256, weights.sha256
            )));
        }
        return extract_member(from, member, &target);
    }
    for (table, spec) in &entry.tables {
        let Some(member) = source.members.get(table) else {
            return Ok(Err(format!("the catalogue names no member for the table `{table}`")));
        };
        let bytes = match read_member(from, member)? {
            Ok(bytes) => bytes,
            Err(why) => return Ok(Err(why)),
        };
        let converted = match movielens::convert(source.layout, table, &bytes) {
            Ok(converted) => converted,
            Err(why) => return Ok(Err(format!("`{}` in it: {why}", member.path))),
        };
        let rows = converted.batch.num_rows() as u64;
        if rows != spec.rows || converted.digest != spec.sha256 {
            return Ok(Err(format!(
                "its table `{table}` has {rows} rows and the content digest {}, {} rows and {} are wanted",
                converted.digest, spec.rows, spec.sha256
            )));
        }
        movielens::write_parquet(&converted.batch, &to.join(table_file(table)))?;
    }
    Ok(Ok(()))
}

fn table_file(table: &str) -> String {
    format!("{table}.parquet")
}

impl Entry {
    /// Table name or `weights` -> file name in the cache.
    pub(super) fn file_names(&self) -> BTreeMap<String, String> {
        match &self.weights {
            Some(weights) => BTreeMap::from([(WEIGHTS.to_owned(), weights.file.clone())]),
            None => self.tables.keys().map(|t| (t.clone(), table_file(t))).collect(),
        }
    }

    /// sha256 of the content that the catalogue promises.
    pub(super) fn content_digest(&self) -> String {
        match &self.weights {
            Some(weights) => weights.sha256.clone(),
            None => {
                let lines: String = self.tables.iter().map(|(t, s)| format!("{t} {}\n", s.sha256)).collect();
                sha256_bytes(lines.as_bytes())
            }
        }
    }
}
