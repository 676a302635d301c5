//! `fetched.json`: what tells that a folder of the cache is complete and right.
//!
//! In: the files of a finished fetch. Out: on later runs, whether those files are still what they were.
//! The marker is written into the folder before the folder gets its name, so a folder with
//! a marker was complete once.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::digest::{Stamp, sha256_of};
use crate::error::{Error, Result};

/// Name of the marker file.
const FILE: &str = "fetched.json";

/// What is known of one file of a finished fetch.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct FileMark {
    pub(super) name: String,
    pub(super) stamp: Stamp,
    pub(super) sha256: String,
}

/// The content of `fetched.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Marker {
    /// Digest of the catalogue entry that this was fetched for.
    pub(super) entry: String,
    /// The source that it came from.
    pub(super) source: String,
    /// The files.
    pub(super) files: Vec<FileMark>,
}

/// What a folder of the cache holds.
pub(super) enum State {
    /// No finished fetch.
    Missing,
    /// Everything is there and right.
    Ready(Marker),
    /// Something was fetched once, but it is no longer what is wanted; says why.
    Stale(String),
}

impl Marker {
    /// A marker for the files in `folder`, which are hashed.
    pub(super) async fn of(folder: &Path, entry: &str, source: &str, names: &[String]) -> Result<Marker> {
        let mut files = Vec::with_capacity(names.len());
        for name in names {
            let path = folder.join(name);
            let sha256 = sha256_of(&path).await?;
            let stamp = Stamp::of(&path)
                .ok_or_else(|| Error::environment(format!("{} went away while it was read", path.display())))?;
            files.push(FileMark { name: name.clone(), stamp, sha256 });
        }
        Ok(Marker { entry: entry.to_owned(), source: source.to_owned(), files })
    }

    /// Writes the marker into `folder`, whole.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(|e| Error::internal("a marker").because(e))?;
        let partial = folder.join(format!(".{FILE}"));
        fs_err::write(&partial, text)
            .and_then(|()| fs_err::rename(&partial, folder.join(FILE)))
            .map_err(|e| Error::environment("cannot write to the cache").because(e))
    }

    /// Whether a folder seems complete, without hashing anything.
    pub(super) fn glance(folder: &Path, entry: &str) -> bool {
        let marker = std::fs::read(folder.join(FILE)).ok().and_then(|b| serde_json::from_slice::<Marker>(&b).ok());
        marker.is_some_and(|marker| {
            let same_size = |f: &FileMark| Stamp::of(&folder.join(&f.name)).is_some_and(|s| s.bytes == f.stamp.bytes);
            marker.entry == entry && marker.files.iter().all(same_size)
        })
    }

    /// Looks at a folder. Files whose size and time are as remembered are not hashed again; others are.
    pub(super) async fn look(folder: &Path, entry: &str) -> Result<State> {
        let Ok(bytes) = std::fs::read(folder.join(FILE)) else { return Ok(State::Missing) };
        let Ok(mut marker) = serde_json::from_slice::<Marker>(&bytes) else {
            return Ok(State::Stale(format!("{} is damaged", folder.join(FILE).display())));
        };
        if marker.entry != entry {
            return Ok(State::Stale("its catalogue entry has changed".into()));
        }
        let mut touched = false;
        for file in &mut marker.files {
            let path = folder.join(&file.name);
            let Some(stamp) = Stamp::of(&path) else {
                return Ok(State::Stale(format!("{} is gone", path.display())));
            };
            if stamp == file.stamp {
                continue;
            }
            if stamp.bytes != file.stamp.bytes || sha256_of(&path).await? != file.sha256 {
                return Ok(State::Stale(format!("{} has changed since it was fetched", path.display())));
            }
            // Copied or restored from a backup: the same content under another time.
            file.stamp = stamp;
            touched = true;
        }
        if touched && let Err(error) = marker.write(folder) {
            tracing::debug!(%error, "the marker could not be brought up to date");
        }
        Ok(State::Ready(marker))
    }
}
