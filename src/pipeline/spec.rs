//! The pipeline file as it is meant: every option resolved, stages in the order to run.
//!
//! In: the path of a pipeline file, `--param` and `--set` arguments. Out: a [`Pipeline`], or one
//! error (exit 78) with every mistake at its place. Nothing is run, and no table is opened.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::diagnostics::{Diagnostic, SourceText, into_error};
use super::document::Origin;
use super::graph::{self, StageNode};
use super::lineage::config::LineageConfig;
use super::params::{fill, read_params};
use super::parse::{apply_sets, parse_document};
use super::unit_tests::{self, UnitTest};
use super::{sandbox, validate};
use crate::device::DeviceChoice;
use crate::error::{Error, Result};
use crate::stages::{KINDS, ResolveContext, StageKind};
use crate::tables::SourceConfig;

/// The keys at the top of a pipeline file.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TopLevel {
    /// Name of the pipeline: letters, digits, `_`, `-` and `.`. It names the runs in the `runs` and
    /// `metrics` tables.
    #[schemars(length(min = 1), regex(pattern = "^[A-Za-z0-9][A-Za-z0-9_.-]*$"))]
    pub name: String,
    /// Seed of every random choice. Each stage gets its own seed, made from this one and the
    /// stage's name, so that adding a stage changes no other.
    #[serde(default = "default_seed")]
    #[schemars(range(min = 0))]
    pub seed: u64,
    /// Folder that every relative path in the file starts from; itself relative to the folder of
    /// the pipeline file.
    #[serde(default = "default_root")]
    pub root: String,
    /// Where models run.
    #[serde(default)]
    pub device: DeviceChoice,
    /// Which interactions count as known when the test item is predicted. It governs the
    /// recommender's input, N(u), the LLM's history and the neighbour's alike.
    #[serde(default)]
    pub history_at_test: HistoryAtTest,
    /// Where the results of stages are kept: a local path, `file://` or `s3://`.
    #[serde(default = "default_artifacts")]
    #[schemars(length(min = 1))]
    pub artifacts: String,
    /// Where published tables lie: a local path, `file://` or `s3://`.
    #[serde(default = "default_warehouse")]
    #[schemars(length(min = 1))]
    pub warehouse: String,
    /// Memory that SQL may use before it spills to disk, for example `"512MiB"` or `"2GiB"`.
    #[serde(default = "default_memory_limit")]
    pub memory_limit: String,
    /// Folder for what SQL spills; the system's temporary folder by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spill_dir: Option<String>,
    /// OpenLineage events of every run; none by default, unless OpenLineage's own environment variables say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lineage: Option<LineageConfig>,
}

fn default_seed() -> u64 {
    42
}
fn default_root() -> String {
    ".".to_owned()
}
fn default_artifacts() -> String {
    "artifacts".to_owned()
}
fn default_warehouse() -> String {
    "warehouse".to_owned()
}
fn default_memory_limit() -> String {
    "2GiB".to_owned()
}

/// Which interactions are known at test time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HistoryAtTest {
    /// The validation item is known when the test item is predicted, as in a deployed system.
    #[default]
    #[serde(rename = "train+valid")]
    TrainValid,
    /// Only the training interactions are known.
    #[serde(rename = "train")]
    Train,
}

impl HistoryAtTest {
    /// As written in the pipeline file.
    pub fn as_str(self) -> &'static str {
        match self {
            HistoryAtTest::TrainValid => "train+valid",
            HistoryAtTest::Train => "train",
        }
    }
}

/// A pipeline file, read, checked and put in order.
pub struct Pipeline {
    /// `name` of the file.
    pub name: String,
    /// The file, as the user named it.
    pub file: PathBuf,
    /// Folder that relative paths start from, absolute.
    pub root: PathBuf,
    /// Seed of the pipeline; the stages' own are in [`StageNode::seed`].
    pub seed: u64,
    /// `device`.
    pub device: DeviceChoice,
    /// `history_at_test`.
    pub history_at_test: HistoryAtTest,
    /// `artifacts`, a URI or a path relative to `root`.
    pub artifacts: String,
    /// `warehouse`, a URI or a path relative to `root`.
    pub warehouse: String,
    /// `memory_limit` in bytes.
    pub memory_limit: usize,
    /// `spill_dir`, absolute.
    pub spill_dir: Option<PathBuf>,
    /// `[lineage]`.
    pub lineage: Option<LineageConfig>,
    /// Name -> value: a string, a number or a boolean.
    pub params: BTreeMap<String, serde_json::Value>,
    /// The sources in the order of the file.
    pub sources: Vec<(String, SourceConfig)>,
    /// The stages in an order in which each comes after those that it reads; among those that
    /// are ready, in the order of the file.
    pub stages: Vec<StageNode>,
    /// The `[[test]]` blocks, in the order of the file.
    pub tests: Vec<UnitTest>,
    /// The text of the file, to show places of it.
    pub source_text: SourceText,
}

impl Pipeline {
    /// The source of that name.
    pub fn source(&self, name: &str) -> Option<&SourceConfig> {
        self.sources.iter().find(|(n, _)| n == name).map(|(_, s)| s)
    }

    /// The stage of that name.
    pub fn stage(&self, name: &str) -> Option<&StageNode> {
        self.stages.iter().find(|s| s.name == name)
    }

    /// An error (exit 78) that points into the file, for what shows only later, such as SQL that
    /// does not fit the columns.
    pub fn error_at(&self, origin: &Origin, message: &str, label: &str, help: Option<&str>) -> Error {
        let mut mistake = Diagnostic::new(message, origin.clone(), label);
        mistake.help.extend(help.map(str::to_owned));
        into_error(vec![mistake], &self.source_text, false)
    }
}

/// What a pipeline file is read with.
#[derive(Clone, Copy)]
pub struct LoadOptions<'a> {
    /// `--param NAME=VALUE`, in order; the last of a name wins.
    pub params: &'a [(String, String)],
    /// `--set PATH=VALUE`, in order.
    pub sets: &'a [(String, String)],
    /// The stage kinds that there are.
    pub kinds: &'static [StageKind],
    /// Whether messages have ANSI colours.
    pub colour: bool,
    /// The folder that no local path of the file may leave (`--sandbox`).
    pub sandbox: Option<&'a Path>,
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        LoadOptions { params: &[], sets: &[], kinds: KINDS, colour: false, sandbox: None }
    }
}

/// Reads a pipeline file with all stage kinds. Errors: exit 78, with every mistake.
pub fn load(path: &Path, params: &[(String, String)], sets: &[(String, String)]) -> Result<Pipeline> {
    load_with(path, &LoadOptions { params, sets, ..LoadOptions::default() })
}

/// Reads a pipeline file. Errors: exit 78, with every mistake.
pub fn load_with(path: &Path, options: &LoadOptions<'_>) -> Result<Pipeline> {
    let unreadable = |e: std::io::Error| {
        Error::spec(format!("cannot read the pipeline file `{}`: {}", path.display(), plain(&e)))
            .with_help("give the path of a pipeline file, for example `tailfuse run pipelines/demo.toml`")
    };
    // Not fs_err: it would name the path a second time.
    #[allow(clippy::disallowed_methods)]
    let bytes = std::fs::read(path).map_err(unreadable)?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let valid = e.utf8_error().valid_up_to();
        let line = 1 + e.as_bytes()[..valid].iter().filter(|b| **b == b'\n').count();
        Error::spec(format!("the pipeline file `{}` is not UTF-8 text (line {line}, byte {valid})", path.display()))
            .with_help("save it as UTF-8")
    })?;
    load_text(text, path, options)
}

fn plain(e: &std::io::Error) -> String {
    match e.kind() {
        std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
        _ => e.to_string(),
    }
}

/// Reads the text of a pipeline file that lies, or would lie, at `path`.
/// Errors: exit 78, with every mistake.
pub fn load_text(text: String, path: &Path, options: &LoadOptions<'_>) -> Result<Pipeline> {
    let source_text = SourceText { name: path.display().to_string(), text };
    let mut found = Vec::new();
    match read(&source_text, path, options, &mut found) {
        Some(pipeline) if found.is_empty() => Ok(Pipeline { source_text, ..pipeline }),
        _ => Err(into_error(found, &source_text, options.colour)),
    }
}

fn read(source: &SourceText, path: &Path, options: &LoadOptions<'_>, out: &mut Vec<Diagnostic>) -> Option<Pipeline> {
    let text = source.text.as_str();
    let mut root = parse_document(text, out)?;
    if root.entries().is_empty() && options.sets.is_empty() {
        out.push(
            Diagnostic::new("the pipeline file is empty", Origin::File(0..0), "")
                .with_help("it needs a `name`, sources and stages; `tailfuse schema --markdown` shows a whole one"),
        );
        return None;
    }
    apply_sets(&mut root, options.sets, out);
    let params = read_params(&root, options.params, out);
    fill(&mut root, &params, text, out);
    let checked = validate::validate(&root, options.kinds, text, out);

    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let top = checked.top?;
    let root_folder = match fs_err::canonicalize(folder.join(&top.root)) {
        Ok(found) if found.is_dir() => found,
        _ => {
            let origin = root.get("root").map_or(Origin::File(0..0), |i| i.origin.clone());
            let name = folder.join(&top.root).display().to_string();
            out.push(
                Diagnostic::new(format!("`root` is not a folder: `{name}`"), origin, "not a folder")
                    .with_help("it is relative to the folder of the pipeline file"),
            );
            return None;
        }
    };
    if let Some(bounds) = options.sandbox {
        let bounds = fs_err::canonicalize(bounds).unwrap_or_else(|_| bounds.to_owned());
        sandbox::check(&root, &root_folder, &bounds, out);
        // Nothing outside is opened, not even to look for more mistakes.
        if !out.is_empty() {
            return None;
        }
    }
    let history_at_test = top.history_at_test.as_str();
    let context = ResolveContext { root: &root_folder, history_at_test };
    let stages = graph::build(checked.stages, &checked.sources, &context, top.seed, text, out);
    // What a test names can only be missed where all stages are known.
    if out.is_empty() {
        unit_tests::check(&checked.tests, &stages, out);
    }
    Some(Pipeline {
        name: top.name,
        file: path.to_owned(),
        seed: top.seed,
        device: top.device,
        history_at_test: top.history_at_test,
        artifacts: top.artifacts,
        warehouse: top.warehouse,
        memory_limit: checked.memory_limit,
        spill_dir: top.spill_dir.map(|d| root_folder.join(d)),
        lineage: top.lineage,
        root: root_folder,
        params: params.values,
        sources: checked.sources.into_iter().filter_map(|s| Some((s.name, s.config?))).collect(),
        stages,
        tests: checked.tests.into_iter().map(|(test, _)| test).collect(),
        source_text: SourceText { name: String::new(), text: String::new() },
    })
}

/// The seed of a stage that has none of its own: from the pipeline's seed and the stage's name
/// alone, in 0..2^63, so that TOML and SQL integers hold it.
pub fn stage_seed(pipeline_seed: u64, stage: &str) -> u64 {
    let mut hash = Sha256::new();
    hash.update(pipeline_seed.to_le_bytes());
    hash.update(stage.as_bytes());
    let digest = hash.finalize();
    let mut first = [0u8; 8];
    first.copy_from_slice(&digest[..8]);
    u64::from_le_bytes(first) >> 1
}

/// Bytes of a size such as `512MiB`, `2 GiB`, `1.5GB` or `1000`. `None` where it is none.
pub fn parse_bytes(text: &str) -> Option<usize> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().ok()?;
    let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    let bytes = number * factor;
    (bytes >= 1.0 && bytes < 2f64.powi(53)).then_some(bytes as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_bytes("2GiB"), Some(2 << 30));
        assert_eq!(parse_bytes(" 1.5 MB "), Some(1_500_000));
        assert_eq!(parse_bytes("1000"), Some(1000));
        for wrong in ["", "GiB", "2 Gigs", "-1GiB", "0", "1e9", "1..2", "9999999TiB"] {
            assert_eq!(parse_bytes(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn seeds_depend_on_name_and_pipeline_and_fit_i64() {
        assert_eq!(stage_seed(42, "train"), stage_seed(42, "train"));
        assert_ne!(stage_seed(42, "train"), stage_seed(43, "train"));
        assert_ne!(stage_seed(42, "train"), stage_seed(42, "train2"));
        for name in ["a", "b", "c", "d", "e", "f", "g", "h"] {
            assert!(i64::try_from(stage_seed(1, name)).is_ok());
        }
    }
}
