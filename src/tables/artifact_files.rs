//! Artifacts that are published for other pipelines: named files, each put whole.
//!
//! In: a store at the artifact's place, file names and contents. Out: one object where the artifact is one file; otherwise a
//! folder with `artifact.json`, put last, which names the objects with their sizes and sha256. Objects are named after
//! their contents, so that an artifact is replaced at once: a reader finds the old one or the new one.

use std::collections::BTreeMap;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::tables::Store;

/// The object that says what an artifact of several files consists of.
pub const MANIFEST: &str = "artifact.json";
/// `format` of [`MANIFEST`].
const FORMAT: &str = "tailfuse-artifact";

/// [`MANIFEST`].
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Manifest {
    format: String,
    version: u32,
    run_id: String,
    files: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    object: String,
    bytes: u64,
    sha256: String,
}

/// A published artifact as its store names it.
#[derive(Clone, Debug)]
pub struct Found {
    /// Changes when the artifact does.
    pub version: String,
    /// When it was published.
    pub published: DateTime<Utc>,
    /// Whether it is one object; else it has a manifest.
    pub single: bool,
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// Publishes one file as the object at `path`.
///
/// # Errors
/// The store fails (exit 75).
pub async fn put_file(store: &Store, path: &str, bytes: Bytes) -> Result<()> {
    store.put(path, bytes).await
}

/// Publishes files as a folder with a manifest; what an earlier version left is taken away.
///
/// # Errors
/// The store fails (exit 75).
pub async fn put_folder(folder: &Store, run_id: &str, files: &BTreeMap<String, Bytes>) -> Result<()> {
    let mut manifest =
        Manifest { format: FORMAT.to_owned(), version: 1, run_id: run_id.to_owned(), files: BTreeMap::new() };
    for (name, bytes) in files {
        let sha256 = sha256(bytes);
        let object = format!("{}-{name}", &sha256[..16]);
        let there = folder.head(&object).await?.is_some_and(|meta| meta.size == bytes.len() as u64);
        if !there {
            folder.put(&object, bytes.clone()).await?;
        }
        manifest.files.insert(name.clone(), Entry { object, bytes: bytes.len() as u64, sha256 });
    }
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| Error::internal(MANIFEST).because(e))?;
    folder.put(MANIFEST, text.into()).await?;
    for object in folder.list("").await? {
        let Some(name) = object.location.filename() else { continue };
        let ours = name == MANIFEST || manifest.files.values().any(|e| e.object == name);
        let by_content = name.len() > 17
            && name.as_bytes()[16] == b'-'
            && name[..16].chars().all(|c| c.is_ascii_hexdigit() && !c.is_ascii_uppercase());
        if !ours && by_content {
            folder.delete(name).await?;
        }
    }
    Ok(())
}

/// Looks for an artifact at the place of `store`: an object, or a folder with a manifest.
///
/// # Errors
/// The store fails (exit 75).
pub async fn find(store: &Store) -> Result<Option<Found>> {
    for (path, single) in [("", true), (MANIFEST, false)] {
        if let Some(meta) = store.head(path).await? {
            let stamp = meta.e_tag.clone().unwrap_or_else(|| meta.last_modified.timestamp_micros().to_string());
            let version = format!("{path} {} {stamp}", meta.size);
            return Ok(Some(Found { version, published: meta.last_modified, single }));
        }
    }
    Ok(None)
}

/// Reads an artifact that [`find`] found: names and contents.
///
/// # Errors
/// It is damaged: a manifest that cannot be read, a file that is missing or differs from it (exit 65); the store fails
/// (exit 75).
pub async fn read(store: &Store, found: &Found) -> Result<BTreeMap<String, Bytes>> {
    if found.single {
        let path = store.path("");
        let name = path.filename().unwrap_or("artifact").to_owned();
        return Ok(BTreeMap::from([(name, store.get("").await?)]));
    }
    let damaged = |why: String| Error::data(format!("the artifact at {} is damaged: {why}", store.display("")));
    let manifest: Manifest = serde_json::from_slice(&store.get(MANIFEST).await?)
        .map_err(|e| damaged(format!("`{MANIFEST}` cannot be read: {e}")))?;
    if manifest.format != FORMAT || manifest.version != 1 {
        return Err(damaged(format!("`{MANIFEST}` has format `{}`, version {}", manifest.format, manifest.version)));
    }
    let mut files = BTreeMap::new();
    for (name, entry) in manifest.files {
        let bytes = store.get_opt(&entry.object).await?.ok_or_else(|| damaged(format!("`{name}` is missing")))?;
        if sha256(&bytes) != entry.sha256 {
            return Err(damaged(format!("`{name}` is not what `{MANIFEST}` says")));
        }
        files.insert(name, bytes);
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(text: &str) -> BTreeMap<String, Bytes> {
        BTreeMap::from([
            ("a.json".to_owned(), Bytes::from(text.to_owned())),
            ("b.bin".to_owned(), Bytes::from_static(b"same")),
        ])
    }

    #[tokio::test]
    async fn a_folder_is_replaced_whole_and_nothing_piles_up() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::local(temp.path()).unwrap();
        let folder = store.child("model");
        assert!(find(&folder).await.unwrap().is_none());
        for text in ["one", "two"] {
            put_folder(&folder, "run", &files(text)).await.unwrap();
            let found = find(&folder).await.unwrap().unwrap();
            assert!(!found.single);
            assert_eq!(read(&folder, &found).await.unwrap(), files(text));
            assert_eq!(folder.list("").await.unwrap().len(), 3);
        }
        let object = folder.list("").await.unwrap()[0].location.filename().unwrap().to_owned();
        folder.put(&object, Bytes::from_static(b"other")).await.unwrap();
        let found = find(&folder).await.unwrap().unwrap();
        let error = read(&folder, &found).await.unwrap_err();
        assert!(error.fault.exit_code() == 65 && error.message.contains("damaged"), "{error}");
    }

    #[tokio::test]
    async fn one_file_is_one_object() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::local(temp.path()).unwrap();
        put_file(&store, "c/calibration.json", Bytes::from_static(b"{}")).await.unwrap();
        let place = store.child("c/calibration.json");
        let found = find(&place).await.unwrap().unwrap();
        let read = read(&place, &found).await.unwrap();
        assert_eq!(read.keys().collect::<Vec<_>>(), ["calibration.json"]);
    }
}
