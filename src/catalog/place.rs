//! Where one entry lives in the cache, and what keeps that place right: one process at a time, nothing
//! half-finished under a final name, nothing of the user's overwritten.
//!
//! In: the cache folder and an entry. Out: paths, the lock, the final rename.
//!
//! | folder in the cache | holds |
//! | --- | --- |
//! | `datasets/NAME/` | a data set's tables as Parquet, and `fetched.json` |
//! | `models/NAME/` | a model's weights, and `fetched.json` |
//! | `downloads/` | files that a person placed there by hand, taken instead of a download |
//! | `tmp/NAME/` | work in progress; of no meaning after the process that made it |
//! | `locks/`, `notices/` | one process at a time per entry; which licence notices were shown |

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::digest::{sha256_bytes, sha256_of};
use super::fetch::{FetchProgress, Fetched};
use super::marker::Marker;
use super::spec::{Entry, EntryKind};
use crate::error::{Error, Result};

/// Raise it when the same source would give other tables: what was converted before is made again then.
const CONVERTER_VERSION: u32 = 1;
/// Look again this often whether another process has finished.
const LOCK_POLL: Duration = Duration::from_millis(200);

/// A fault of the cache folder (exit 75).
pub(super) fn cache_error(e: std::io::Error) -> Error {
    Error::environment("cannot write to the cache").because(e).with_help("TAILFUSE_CACHE names another folder")
}

/// A file that a person placed must be the right one: it is neither used nor overwritten otherwise.
pub(super) async fn check_by_hand(path: &Path, wanted: &str) -> Result<()> {
    match sha256_of(path).await? {
        found if found == wanted => Ok(()),
        found => Err(Error::data(format!("{} has the sha256 {found}, {wanted} is wanted", path.display()))
            .with_help("put the right file there, or delete it to have it downloaded")),
    }
}

/// Where one entry lives in the cache.
pub(super) struct Place<'a> {
    pub(super) name: &'a str,
    pub(super) entry: &'a Entry,
    /// Digest of what the entry promises: a folder that was fetched for another one is stale.
    pub(super) entry_digest: String,
    cache: &'a Path,
    pub(super) folder: PathBuf,
    pub(super) downloads: PathBuf,
}

impl<'a> Place<'a> {
    pub(super) fn new(cache: &'a Path, name: &'a str, entry: &'a Entry) -> Self {
        let shelf = match entry.kind {
            EntryKind::Dataset => "datasets",
            EntryKind::Model => "models",
        };
        Place {
            name,
            entry,
            entry_digest: sha256_bytes(format!("{CONVERTER_VERSION} {}", entry.content_digest()).as_bytes()),
            cache,
            folder: cache.join(shelf).join(name),
            downloads: cache.join("downloads"),
        }
    }

    pub(super) fn fetched(&self, marker: Marker, cached: bool) -> Fetched {
        Fetched {
            name: self.name.to_owned(),
            kind: self.entry.kind,
            folder: self.folder.clone(),
            files: self.entry.file_names().into_iter().map(|(key, file)| (key, self.folder.join(file))).collect(),
            digest: self.entry.content_digest(),
            source: marker.source,
            cached,
        }
    }

    /// Says the licence notice, once per cache.
    pub(super) fn notice_once(&self, progress: &dyn FetchProgress) {
        let Some(notice) = &self.entry.notice else { return };
        let shown = self.cache.join("notices").join(self.name);
        if std::fs::read_to_string(&shown).is_ok_and(|text| text.trim() == notice.trim()) {
            return;
        }
        progress.line(notice.trim());
        let kept = std::fs::create_dir_all(self.cache.join("notices")).and_then(|()| std::fs::write(&shown, notice));
        if let Err(error) = kept {
            tracing::debug!(%error, "that the notice was shown could not be remembered");
        }
    }

    /// Waits until no other process works on this entry. The lock ends with the process, however that ends.
    pub(super) async fn lock(&self, progress: &dyn FetchProgress) -> Result<fs_err::File> {
        let folder = self.cache.join("locks");
        fs_err::create_dir_all(&folder).map_err(cache_error)?;
        let file = fs_err::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(folder.join(self.name))
            .map_err(cache_error)?;
        let mut said = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(std::fs::TryLockError::Error(e)) => return Err(cache_error(e)),
                Err(std::fs::TryLockError::WouldBlock) => {
                    if !said {
                        progress.line(&format!("`{}` is being fetched by another process; waiting for it", self.name));
                        said = true;
                    }
                    tokio::time::sleep(LOCK_POLL).await;
                }
            }
        }
    }

    /// Weights that a person put in their place are taken as they are when they are the right ones.
    pub(super) async fn adopt(&self) -> Result<Option<Marker>> {
        let Some(weights) = &self.entry.weights else { return Ok(None) };
        let path = self.folder.join(&weights.file);
        if !path.is_file() {
            return Ok(None);
        }
        check_by_hand(&path, &weights.sha256).await?;
        let marker =
            Marker::of(&self.folder, &self.entry_digest, "placed by hand", std::slice::from_ref(&weights.file)).await?;
        if let Err(error) = marker.write(&self.folder) {
            tracing::debug!(%error, "the marker could not be written: the file is hashed again next time");
        }
        Ok(Some(marker))
    }

    /// An empty folder for work in progress; leftovers of a process that was killed go.
    pub(super) fn fresh_work_folder(&self) -> Result<PathBuf> {
        let work = self.cache.join("tmp").join(self.name);
        if work.exists() {
            fs_err::remove_dir_all(&work).map_err(cache_error)?;
        }
        fs_err::create_dir_all(&work).map_err(cache_error)?;
        Ok(work)
    }

    /// Gives the finished folder its name. A reader sees no folder, or a complete one.
    pub(super) fn commit(&self, ready: &Path) -> Result<()> {
        if let Some(shelf) = self.folder.parent() {
            fs_err::create_dir_all(shelf).map_err(cache_error)?;
        }
        if self.folder.exists() {
            fs_err::remove_dir_all(&self.folder).map_err(cache_error)?;
        }
        fs_err::rename(ready, &self.folder).map_err(cache_error)?;
        let work = self.cache.join("tmp").join(self.name);
        if let Err(error) = std::fs::remove_dir_all(&work) {
            tracing::debug!(%error, "the work folder could not be deleted");
        }
        Ok(())
    }

    pub(super) fn nothing_answered(&self, said: &[String]) -> Error {
        let mut by_hand: Vec<String> = self
            .entry
            .sources
            .iter()
            .map(|s| format!("    {}  sha256 {}", self.downloads.join(&s.file).display(), s.sha256))
            .collect();
        if let Some(weights) = &self.entry.weights {
            by_hand.push(format!("    {}  sha256 {}", self.folder.join(&weights.file).display(), weights.sha256));
        }
        let count = match said.len() {
            1 => "its only source did not give it".to_owned(),
            n => format!("none of its {n} sources gave it"),
        };
        Error::environment(format!("cannot get `{}`: {count}\n{}", self.name, said.join("\n"))).with_help(format!(
            "try again when the network is there, or place one of these files by hand and run the same command:\n{}",
            by_hand.join("\n")
        ))
    }
}
