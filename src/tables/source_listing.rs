//! Which files a source has: listed by path, or by the log of a Delta table, less those that the filter excludes by their folders.
//!
//! In: the store opened at the source's URI and the source's config. Out: [`SourceObject`]s in path order, or why there are none,
//! which is bad input or nothing to do, as `on_missing` says.

use std::sync::Arc;

use object_store::ObjectMeta;

use crate::error::{Error, Fault, Result};
use crate::tables::Store;
use crate::tables::delta::read::{ActiveFile, Declared, Snapshot};
use crate::tables::delta::{self, At};
use crate::tables::partitions::{PartitionValues, may_match};
use crate::tables::source_config::{OnMissing, SourceConfig, SourceFormat};
use crate::tables::source_files::{SourceFile, Unified, predicate};

/// A data file of a source.
#[derive(Clone, Debug)]
pub struct SourceObject {
    /// Path, size, time and tag.
    pub meta: ObjectMeta,
    /// Its name below the source's URI; empty where the URI is the file itself.
    pub file: String,
    /// The values of its Hive folders, or of its partition in a Delta table.
    pub folders: PartitionValues,
    /// What the Delta table declares that it is a file of.
    pub table: Option<Arc<Declared>>,
}

impl SourceObject {
    /// What changes when the object does: name, size, and the store's tag or time.
    pub fn version(&self) -> String {
        let stamp = match &self.meta.e_tag {
            Some(tag) => tag.clone(),
            None => self.meta.last_modified.timestamp_micros().to_string(),
        };
        let columns = self.table.as_ref().map_or_else(String::new, |t| format!("-{}", t.digest));
        format!("{} {} {stamp}{columns}", self.file, self.meta.size)
    }
}

/// The data files of a source in path order, without those that the filter excludes by their
/// folders. `store` is opened at the source's URI, a file or a folder. Errors: nothing is there,
/// or nothing that the filter leaves (exit 65); the store does not answer (exit 75).
pub async fn source_objects(name: &str, config: &SourceConfig, store: &Store) -> Result<Vec<SourceObject>> {
    let found = present_objects(name, config, store).await.and_then(|objects| {
        check_needs(name, config, store, &objects)?;
        Ok(objects)
    });
    // What is not there is bad input, or nothing to do, as the config says.
    found.map_err(|absent| match absent {
        Absent::Nothing(e) if config.on_missing == OnMissing::Skip => Error { fault: Fault::NothingToDo, ..e },
        Absent::Nothing(e) | Absent::Failed(e) => e,
    })
}

/// Why there are no files to read.
enum Absent {
    /// They are not there.
    Nothing(Error),
    /// It could not be found out.
    Failed(Error),
}

impl From<Error> for Absent {
    fn from(e: Error) -> Self {
        Absent::Failed(e)
    }
}

/// The partition that the run is about must be among the files.
fn check_needs(name: &str, config: &SourceConfig, store: &Store, objects: &[SourceObject]) -> Result<(), Absent> {
    let has = |o: &SourceObject| config.needs.iter().all(|(c, v)| o.folders.get(c) == Some(v.as_str()));
    if config.needs.is_empty() || objects.iter().any(has) {
        return Ok(());
    }
    let needed: Vec<String> = config.needs.iter().map(|(c, v)| format!("{c}={v}")).collect();
    let last = objects.last().map(|o| store.display(&o.file)).unwrap_or_default();
    Err(Absent::Nothing(
        Error::data(format!(
            "source `{name}` has no file of the partition {} (the last one is {last})",
            needed.join("/")
        ))
        .with_help("wait for the job that writes it, or set on_missing = \"skip\""),
    ))
}

async fn present_objects(name: &str, config: &SourceConfig, store: &Store) -> Result<Vec<SourceObject>, Absent> {
    let objects = list(name, config, store).await?;
    let Some(filter) = config.filter.as_deref().filter(|_| objects.iter().any(|o| !o.folders.is_empty())) else {
        return Ok(objects);
    };
    // The filter needs column types; those of the first file stand for all. Where it names a
    // column that only other files have, nothing is pruned here and the reader has the last word.
    let first = SourceFile::open(config, store, objects[0].clone()).await?;
    let columns = Unified::of(name, config, std::slice::from_ref(&first))?;
    let Ok(predicate) = predicate(name, filter, &columns.schema) else { return Ok(objects) };
    let folders: Vec<&PartitionValues> = objects.iter().map(|o| &o.folders).collect();
    let keep = may_match(&predicate, &columns.schema, &folders);
    let left: Vec<SourceObject> = objects.iter().zip(keep).filter(|(_, k)| *k).map(|(o, _)| o.clone()).collect();
    if left.is_empty() {
        let last = objects.last().map(|o| store.display(&o.file)).unwrap_or_default();
        return Err(Absent::Nothing(
            Error::data(format!(
                "source `{name}` has no rows: its filter `{filter}` excludes all {} files (the last one is {last})",
                objects.len()
            ))
            .with_help("check the parameters of the run against the partitions that are there"),
        ));
    }
    Ok(left)
}

async fn list(name: &str, config: &SourceConfig, store: &Store) -> Result<Vec<SourceObject>, Absent> {
    let file = match config.format {
        Some(SourceFormat::Delta) => None,
        // Not every server of objects can say of a folder's name that there is no such object.
        _ if store.is_prefix().await? => None,
        _ => store.head("").await?,
    };
    if let Some(at) = delta_state(name, config, store, file.is_none()).await? {
        return list_delta(name, store, at).await;
    }
    if let Some(meta) = file {
        return Ok(vec![SourceObject { meta, file: String::new(), folders: PartitionValues::default(), table: None }]);
    }
    let root = store.path("");
    let found = store.list("").await?;
    let any = !found.is_empty();
    let mut objects = Vec::new();
    for meta in found {
        let file = match meta.location.prefix_match(&root) {
            Some(parts) => parts.map(|p| p.as_ref().to_owned()).collect::<Vec<_>>().join("/"),
            None => continue,
        };
        if is_data_file(&file) && meta.size > 0 {
            let folders = PartitionValues::of(&root, &meta.location);
            objects.push(SourceObject { meta, file, folders, table: None });
        }
    }
    // A folder without `format` is read as what its first file is; the rest must agree.
    let format = match (config.format, objects.first()) {
        (Some(format), _) => Some(format),
        (None, Some(first)) => format_of_name(&first.file),
        (None, None) => None,
    };
    objects.retain(|o| format.is_none() || format_of_name(&o.file).is_none_or(|f| Some(f) == format));
    match (objects.is_empty(), any) {
        (false, _) => Ok(objects),
        (true, true) => Err(Absent::Nothing(Error::data(format!("source `{name}`: there is no data file below {}", store.display("")))
            .with_help("data files end in .parquet or .csv, .tsv, .txt; names that begin with `_` or `.` are left out; set `format` for others"))),
        (true, false) => Err(Absent::Nothing(Error::data(format!("source `{name}`: there is nothing at {}", store.display("")))
            .with_help("check `uri`: a path without a scheme starts from the pipeline's `root`"))),
    }
}

/// Which state of a Delta table the source means; `None` where it is none.
async fn delta_state(name: &str, config: &SourceConfig, store: &Store, folder: bool) -> Result<Option<At>> {
    let at = match (config.version, &config.timestamp) {
        (None, None) => None,
        (Some(version), None) => Some(At::Version(version)),
        (None, Some(text)) => Some(At::time(text).ok_or_else(|| {
            Error::spec(format!("source `{name}`: `timestamp` is `{text}`, which is not a time"))
                .with_help("write 2026-11-22T03:00:00Z, \"2026-11-22 03:00:00\" or 2026-11-22 (UTC)")
        })?),
        (Some(_), Some(_)) => {
            return Err(Error::spec(format!("source `{name}` has both `version` and `timestamp`"))
                .with_help("keep the one that is meant"));
        }
    };
    let wanted = config.format == Some(SourceFormat::Delta);
    let found = || async { Ok::<_, Error>(folder && config.format.is_none() && delta::is_table(store).await?) };
    match (wanted || found().await?, at) {
        (true, at) => Ok(Some(at.unwrap_or_default())),
        (false, None) => Ok(None),
        (false, Some(_)) => Err(Error::data(format!(
            "source `{name}` has a `version` or `timestamp`, but {} is not a Delta table",
            store.display("")
        ))
        .with_help("check `uri` and `format`, or leave them out: files have no versions")),
    }
}

async fn list_delta(name: &str, store: &Store, at: At) -> Result<Vec<SourceObject>, Absent> {
    let Snapshot { declared, files } = Snapshot::open(store, at).await.map_err(|e| e.at(format!("source `{name}`")))?;
    if files.is_empty() {
        let error = Error::data(format!(
            "source `{name}`: the Delta table {} has no rows in version {}",
            store.display(""),
            declared.version
        ));
        return Err(Absent::Nothing(error.with_help("check `uri`, `version` and `timestamp`")));
    }
    let object =
        |f: ActiveFile| SourceObject { meta: f.meta, file: f.file, folders: f.values, table: Some(declared.clone()) };
    Ok(files.into_iter().map(object).collect())
}

/// Spark, Hive and editors leave files beside the data, whose names begin with `_` or `.`.
pub(super) fn is_data_file(file: &str) -> bool {
    let hidden = |part: &str| (part.starts_with('_') && !part.contains('=')) || part.starts_with('.');
    !file.split('/').any(hidden) && !file.ends_with(".crc")
}

pub(super) fn format_of_name(file: &str) -> Option<SourceFormat> {
    let name = file.rsplit('/').next().unwrap_or(file).to_ascii_lowercase();
    match name.rsplit_once('.')?.1 {
        "parquet" | "parq" | "pq" => Some(SourceFormat::Parquet),
        "csv" | "tsv" | "txt" => Some(SourceFormat::Csv),
        _ => None,
    }
}
