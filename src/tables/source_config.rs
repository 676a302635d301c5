//! What the pipeline file says about a source: `[sources.NAME]`.
//!
//! In: the source's table of the pipeline file, templated and checked against the schema
//! of this type. Out: plain data for the reader in `tables/source.rs`; no logic here.
//! The doc comments are the user's documentation: `docs/pipeline.md` is made from them.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where a table comes from and what its columns mean.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// Where the data lies: a local path, `file://`, `s3://bucket/prefix`, or
    /// `catalog:DATASET/TABLE` (for example `catalog:ml-100k/interactions`). A path without a
    /// scheme starts from the pipeline's `root`. A folder means all data files below it, in path
    /// order, with Hive partition folders (`ds=2026-11-22/`) as columns.
    #[schemars(length(min = 1))]
    pub uri: String,
    /// File format. By default a folder with a `_delta_log` is a Delta table, and everything else
    /// follows from the file name's ending; a catalogue entry knows its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<SourceFormat>,
    /// Delta only: the version to read, in place of the latest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// Delta only: reads the latest version that was committed at or before this time, in RFC 3339
    /// or as `YYYY-MM-DD[ HH:MM:SS]` in UTC (a day means its first instant).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<String>,
    /// Our column name = the source's column name, for example
    /// `{ user_id = "uid", item_id = "movie" }`. Columns that are not mapped pass through under
    /// their own names.
    #[serde(default)]
    pub columns: BTreeMap<String, String>,
    /// An SQL predicate over the source's own columns (before mapping); only rows for which it
    /// is true are read. It prunes Hive partitions and Parquet row groups.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// What the rows are, which decides the cleaning they get: `interactions` (ids present,
    /// duplicates dropped, the last re-rating wins), `items` (item ids present, one row an item)
    /// or `table` (nothing); or that it is no table but an `artifact`, a calibration or a model that another pipeline
    /// published with `write_artifact`. By default `interactions` where `user_id` and `item_id` are there
    /// after mapping, `items` where only `item_id` is, else `table`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<SourceRole>,
    /// `role = "artifact"`: age in days above which the run warns (in the log, and in `warnings` of the result document).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0))]
    pub max_age_days: Option<f64>,
    /// `role = "artifact"`: whether it may be absent; it has no files then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub optional: bool,
    /// `role = "artifact"`: the command that makes it, told where it is absent, damaged or old, for example
    /// `"tailfuse run pipelines/calibrate.toml"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_by: Option<String>,
    /// What is done where there is nothing to read: no file at `uri`, none that `filter` leaves, or not the partition that
    /// `needs` names. `fail` ends the run with exit code 65, `skip` with 99, which a scheduler shows as a skip.
    #[serde(default, skip_serializing_if = "OnMissing::is_default")]
    pub on_missing: OnMissing,
    /// The Hive partition that this run is about, for example `{ ds = "{{ ds }}" }`: a file of it must be there, though
    /// earlier ones may be. See `on_missing`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub needs: BTreeMap<String, String>,
    /// Largest tolerated share of bad rows (null or empty ids, values that don't parse). Bad rows
    /// are set aside in the output `bad_rows`; above this share the run stops with exit code 65.
    #[serde(default = "default_max_bad_rows")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub max_bad_rows: f64,
    /// CSV only: the character between two fields, for example `"\t"`.
    #[serde(default = "default_delimiter")]
    #[schemars(length(min = 1, max = 1))]
    pub delimiter: String,
    /// CSV only: whether the first line of each file holds the column names. Without it the
    /// columns are named `column_1`, `column_2` and so on.
    #[serde(default = "default_header")]
    pub header: bool,
    /// CSV only: the source's column name = its type. Columns that are not listed get the
    /// narrowest type that all their values fit.
    #[serde(default)]
    pub types: BTreeMap<String, ColumnType>,
}

impl Default for SourceConfig {
    /// All defaults and an empty `uri`, to build configs by hand in tests.
    fn default() -> Self {
        SourceConfig {
            uri: String::new(),
            format: None,
            version: None,
            timestamp: None,
            columns: BTreeMap::new(),
            filter: None,
            role: None,
            max_age_days: None,
            optional: false,
            made_by: None,
            on_missing: OnMissing::default(),
            needs: BTreeMap::new(),
            max_bad_rows: default_max_bad_rows(),
            delimiter: default_delimiter(),
            header: default_header(),
            types: BTreeMap::new(),
        }
    }
}

/// File format of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SourceFormat {
    /// Apache Parquet (`.parquet`).
    Parquet,
    /// Text with one row a line (`.csv`, `.tsv`, `.txt`).
    Csv,
    /// A Delta table, a folder with a `_delta_log`.
    Delta,
}

/// What is done where a source has nothing to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnMissing {
    /// The run fails (exit code 65).
    #[default]
    Fail,
    /// There is nothing to do (exit code 99).
    Skip,
}

impl OnMissing {
    fn is_default(&self) -> bool {
        *self == OnMissing::default()
    }
}

/// What the rows of a source are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SourceRole {
    /// An interaction log: one row for what a user did with an item.
    Interactions,
    /// An item table: one row an item.
    Items,
    /// Any other table, read as it is.
    Table,
    /// No table: files that another pipeline published.
    Artifact,
}

/// Type of a CSV column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ColumnType {
    /// 64-bit signed integer.
    Int64,
    /// 64-bit float.
    Float64,
    /// 32-bit float.
    Float32,
    /// UTF-8 text.
    String,
    /// A point in time (RFC 3339 or `YYYY-MM-DD[ HH:MM:SS]`), kept in microseconds UTC.
    Timestamp,
    /// `true` or `false`.
    Boolean,
}

fn default_max_bad_rows() -> f64 {
    0.01
}

fn default_delimiter() -> String {
    ",".to_owned()
}

fn default_header() -> bool {
    true
}
