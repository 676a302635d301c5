//! The config of a source checked against the columns that are there.
//!
//! In: a [`SourceConfig`] and the files' columns. Out: a [`Plan`]: each output column with where it comes from and
//! how it is cleaned, the schemas of the table and of the bad rows; or an error that names file and column.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};

use super::source::{FILE, ROW_IN_FILE};
use crate::columns::{ITEM_ID, RATING, REASON, ROW_ID, TIMESTAMP, TITLE, USER_ID};
use crate::error::{Error, Result};
use crate::tables::cleaning::{Rule, type_after};
use crate::tables::repeats::Key;
use crate::tables::source_config::{SourceConfig, SourceRole};
use crate::tables::source_files::{SourceFile, Unified};

/// One output column.
pub(super) struct Output {
    pub(super) name: String,
    /// Its place among the source's columns.
    pub(super) from: usize,
    pub(super) rule: Rule,
}

/// The config checked against the columns that are there.
pub(super) struct Plan {
    pub(super) role: SourceRole,
    pub(super) outputs: Vec<Output>,
    pub(super) schema: SchemaRef,
    pub(super) bad_schema: SchemaRef,
    pub(super) key: Option<Key>,
}

impl Plan {
    pub(super) fn new(name: &str, config: &SourceConfig, files: &[SourceFile], columns: &Unified) -> Result<Self> {
        let own: Vec<&str> = columns.schema.fields().iter().map(|f| f.name().as_str()).collect();
        for (ours, theirs) in &config.columns {
            for file in files {
                let in_folder = file.object.folders.names().any(|n| n == theirs);
                // A file of a Delta table may be older than one of the table's columns.
                let declared = file.object.table.as_ref().is_some_and(|t| t.schema.index_of(theirs).is_ok());
                if !in_folder && !declared && !file.columns.iter().any(|(c, _)| c == theirs) {
                    let there: Vec<&str> =
                        file.columns.iter().map(|(c, _)| c.as_str()).chain(file.object.folders.names()).collect();
                    return Err(missing(name, theirs, Some(ours), &file.name, &there));
                }
            }
        }
        for theirs in config.types.keys() {
            if !own.contains(&theirs.as_str()) {
                let first = files.first().map(|f| f.name.as_str()).unwrap_or_default();
                return Err(missing(name, theirs, None, first, &own).at("in `types`"));
            }
        }
        let mut named: Vec<(String, usize)> = Vec::new();
        for (from, column) in own.iter().enumerate() {
            let ours: Vec<&String> = config.columns.iter().filter(|(_, t)| t == column).map(|(o, _)| o).collect();
            match ours.is_empty() {
                true => named.push(((*column).to_owned(), from)),
                false => named.extend(ours.into_iter().map(|o| (o.clone(), from))),
            }
        }
        if named.iter().any(|(n, _)| n == ROW_ID) {
            return Err(Error::data(format!(
                "source `{name}` has a column `{ROW_ID}`, which is the name of the column that the reader adds"
            ))
            .with_help(format!("map it to another name: columns = {{ source_{ROW_ID} = \"{ROW_ID}\" }}")));
        }
        if let Some((i, (twice, _))) =
            named.iter().enumerate().find(|(i, (n, _))| named[..*i].iter().any(|(m, _)| m == n))
        {
            let theirs = config.columns.get(twice).map(String::as_str).unwrap_or(own[named[i].1]);
            return Err(Error::data(format!(
                "source `{name}`: `{twice}` is mapped from `{theirs}`, but the files also have a column `{twice}`"
            ))
            .with_help(format!(
                "map that one to a name of its own: columns = {{ {twice} = \"{theirs}\", other_{twice} = \"{twice}\" }}"
            )));
        }
        let has = |wanted: &str| named.iter().any(|(n, _)| n == wanted);
        let role = config.role.unwrap_or(match (has(USER_ID), has(ITEM_ID)) {
            (true, true) => SourceRole::Interactions,
            (false, true) => SourceRole::Items,
            _ => SourceRole::Table,
        });
        let needed: &[&str] = match role {
            SourceRole::Interactions => &[USER_ID, ITEM_ID],
            SourceRole::Items => &[ITEM_ID],
            SourceRole::Table | SourceRole::Artifact => &[],
        };
        for column in needed {
            if !has(column) {
                let first = files.first().map(|f| f.name.as_str()).unwrap_or_default();
                let e = missing(name, column, None, first, &own);
                return Err(match e.help {
                    Some(help) => Error::new(e.fault, e.message)
                        .with_help(format!("{help}; map it: columns = {{ {column} = \"...\" }}")),
                    None => e,
                });
            }
        }
        let outputs: Vec<Output> =
            named.into_iter().map(|(name, from)| Output { rule: rule_of(role, &name), name, from }).collect();
        let mut fields = vec![Field::new(ROW_ID, DataType::Int64, false)];
        for output in &outputs {
            let theirs = columns.schema.field(output.from);
            let to = type_after(output.rule, theirs.data_type()).map_err(|why| {
                let file = files.iter().find(|f| f.columns.iter().any(|(c, _)| c == theirs.name()));
                Error::data(format!(
                    "source `{name}`: column `{}` of {} has type {} and is mapped to `{}`: {why}",
                    theirs.name(), file.map(|f| f.name.as_str()).unwrap_or_default(), theirs.data_type(), output.name
                ))
                .with_help("map another column, write the file with the column in a fitting type, or (CSV) declare it in `types`")
            })?;
            let sure = matches!(output.rule, Rule::Id | Rule::Rating | Rule::Timestamp);
            fields.push(Field::new(&output.name, to, !sure));
        }
        let key = match role {
            SourceRole::Interactions => Some(Key::UserAndItem),
            SourceRole::Items => Some(Key::Item),
            SourceRole::Table | SourceRole::Artifact => None,
        };
        let bad_schema = bad_schema(&columns.schema);
        Ok(Plan { role, outputs, schema: Arc::new(Schema::new(fields)), bad_schema, key })
    }
}

fn rule_of(role: SourceRole, ours: &str) -> Rule {
    match (role, ours) {
        (SourceRole::Interactions, USER_ID | ITEM_ID) | (SourceRole::Items, ITEM_ID) => Rule::Id,
        (SourceRole::Interactions, RATING) => Rule::Rating,
        (SourceRole::Interactions, TIMESTAMP) => Rule::Timestamp,
        (SourceRole::Items, TITLE) => Rule::Title,
        (_, USER_ID | ITEM_ID) => Rule::LooseId,
        _ => Rule::Pass,
    }
}

fn missing(source: &str, column: &str, ours: Option<&str>, file: &str, there: &[&str]) -> Error {
    let mapped = ours.filter(|o| *o != column).map(|o| format!(" (mapped to `{o}`)")).unwrap_or_default();
    let close = nearest(column, there).map(|n| format!("did you mean `{n}`? ")).unwrap_or_default();
    Error::data(format!("source `{source}`: column `{column}`{mapped} is missing in {file}"))
        .with_help(format!("{close}the columns are: {}", there.join(", ")))
}

/// The name most like `wanted`, if one is close.
fn nearest<'a>(wanted: &str, there: &[&'a str]) -> Option<&'a str> {
    let likeness = |n: &str| strsim::jaro_winkler(&wanted.to_lowercase(), &n.to_lowercase());
    let best = there.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
    (likeness(best) > 0.75).then_some(*best)
}

/// `row_id`, `file`, `row_in_file`, `reason`, then the columns that can be written as text. A
/// column that has one of these names gets `_value` at its end.
fn bad_schema(columns: &SchemaRef) -> SchemaRef {
    let mut fields = vec![
        Field::new(ROW_ID, DataType::Int64, false),
        Field::new(FILE, DataType::Utf8, false),
        Field::new(ROW_IN_FILE, DataType::Int64, false),
        Field::new(REASON, DataType::Utf8, false),
    ];
    let own = columns.fields().iter().filter(|f| is_simple(f.data_type())).map(|f| {
        let taken = [ROW_ID, FILE, ROW_IN_FILE, REASON].contains(&f.name().as_str());
        Field::new(if taken { format!("{}_value", f.name()) } else { f.name().clone() }, DataType::Utf8, true)
    });
    fields.extend(own);
    Arc::new(Schema::new(fields))
}

pub(super) fn is_simple(t: &DataType) -> bool {
    !t.is_nested() && arrow::compute::can_cast_types(t, &DataType::Utf8)
}
