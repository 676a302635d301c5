//! sha256 of bytes and files, and a memory of files that were hashed already.
//!
//! In: bytes, paths. Out: lower-case hexadecimal digests. A file is hashed again only when its size or
//! time of change differs from what the memory (`digests.json` in the cache folder) holds.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Read this much at a time.
const BLOCK: usize = 1 << 20;

/// A running sha256.
#[derive(Default)]
pub(super) struct Hasher(Sha256);

impl Hasher {
    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Lower-case hexadecimal digest of all that was given.
    pub(super) fn finish(self) -> String {
        use std::fmt::Write;
        self.0.finalize().iter().fold(String::with_capacity(64), |mut text, byte| {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
    }
}

/// sha256 (hex) of bytes.
pub fn sha256_bytes(bytes: &[u8]) -> String {
    let mut hasher = Hasher::default();
    hasher.update(bytes);
    hasher.finish()
}

/// sha256 (hex) of a file, read in blocks. Error (exit 65) names the file.
pub fn sha256_file(path: &Path) -> Result<String> {
    let fail = |e| Error::data("cannot read a file to take its sha256").because(e);
    let mut file = fs_err::File::open(path).map_err(fail)?;
    let mut block = vec![0u8; BLOCK];
    let mut hasher = Hasher::default();
    loop {
        match file.read(&mut block).map_err(fail)? {
            0 => return Ok(hasher.finish()),
            n => hasher.update(&block[..n]),
        }
    }
}

/// [`sha256_file`] on a thread that may block.
pub(super) async fn sha256_of(path: &Path) -> Result<String> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || sha256_file(&path)).await?
}

/// Size and time of change (nanoseconds since 1970): what tells that a file was touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp {
    pub(super) bytes: u64,
    pub(super) modified_ns: u64,
}

impl Stamp {
    /// The stamp of a file; `None` where there is no such file.
    pub(super) fn of(path: &Path) -> Option<Stamp> {
        let meta = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
        let since = meta.modified().ok()?.duration_since(UNIX_EPOCH).unwrap_or_default();
        Some(Stamp { bytes: meta.len(), modified_ns: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX) })
    }
}

/// What is remembered of one file.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Known {
    stamp: Stamp,
    sha256: String,
}

/// sha256 of a file that is not ours (weights that the user named by path), remembered in `cache/digests.json`.
/// A memory that cannot be read or written costs time, nothing else.
pub(super) fn remembered_sha256(path: &Path, cache: &Path) -> Result<String> {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let key = absolute.display().to_string();
    let memory = cache.join("digests.json");
    let stamp = Stamp::of(&absolute);
    let mut known = read_memory(&memory);
    if let (Some(stamp), Some(found)) = (stamp, known.get(&key))
        && found.stamp == stamp
    {
        return Ok(found.sha256.clone());
    }
    let sha256 = sha256_file(&absolute)?;
    if let Some(stamp) = stamp {
        known.insert(key, Known { stamp, sha256: sha256.clone() });
        write_memory(&memory, &known);
    }
    Ok(sha256)
}

fn read_memory(path: &Path) -> BTreeMap<String, Known> {
    std::fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

fn write_memory(path: &Path, known: &BTreeMap<String, Known>) {
    let Ok(text) = serde_json::to_vec_pretty(known) else { return };
    let Some(folder) = path.parent() else { return };
    // Put whole by a rename, so that another process never reads half of it.
    let partial = folder.join(format!(".digests.json.{}", std::process::id()));
    let written = std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&partial, text))
        .and_then(|()| std::fs::rename(&partial, path));
    if let Err(error) = written {
        tracing::debug!(path = %path.display(), %error, "the digests of weights could not be kept");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_sha256() {
        // FIPS 180-4, the example message "abc".
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_bytes(b"abc"), abc);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abc");
        std::fs::write(&path, b"abc").unwrap();
        assert_eq!(sha256_file(&path).unwrap(), abc);
    }

    #[test]
    fn a_file_longer_than_a_block_is_hashed_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("long");
        let bytes: Vec<u8> = (0..BLOCK + 17).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(sha256_file(&path).unwrap(), sha256_bytes(&bytes));
    }

    #[test]
    fn a_remembered_digest_follows_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let (path, cache) = (folder.path().join("w"), folder.path().join("cache"));
        std::fs::write(&path, b"one").unwrap();
        assert_eq!(remembered_sha256(&path, &cache).unwrap(), sha256_bytes(b"one"));
        // The memory is what answers: a false entry with the right stamp is believed.
        let memory = cache.join("digests.json");
        let text = std::fs::read_to_string(&memory).unwrap().replace(&sha256_bytes(b"one"), &"0".repeat(64));
        std::fs::write(&memory, text).unwrap();
        assert_eq!(remembered_sha256(&path, &cache).unwrap(), "0".repeat(64));
        // Another size: hashed again.
        std::fs::write(&path, b"three").unwrap();
        assert_eq!(remembered_sha256(&path, &cache).unwrap(), sha256_bytes(b"three"));
        // A damaged memory costs time only.
        std::fs::write(&memory, "{").unwrap();
        assert_eq!(remembered_sha256(&path, &cache).unwrap(), sha256_bytes(b"three"));
    }
}
