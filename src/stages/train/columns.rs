//! The side columns of rating models: from tables to encoded fields.
//!
//! In: [`FieldsConfig`], the tables of users and items, the rows of ratings. Out: [`Column`]s by user, item or
//! row for [`crate::interactions::fields`], and all of them encoded.

use std::collections::HashSet;

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{DataType, Float64Type, Int64Type, SchemaRef};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::columns::{ITEM_ID, RATING, USER_ID};
use crate::error::{Error, Result};
use crate::interactions::IdMap;
use crate::interactions::fields::{Column, Field, FieldSet, Kind, Side, Values};
use crate::tables::Table;

/// The columns besides the ids that a rating model reads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FieldsConfig {
    /// Columns of the `users` table, for example `["age", "gender", "occupation"]`. A column of integers or strings
    /// is one category per user.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub user: Vec<String>,
    /// Columns of the `items` table, for example `["release_year", "genres"]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub item: Vec<String>,
    /// Columns of the ratings themselves (`train`, `valid`), for example `["device"]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub row: Vec<String>,
    /// Which of these hold several categories: lists of strings, or strings that `separator` divides.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub multi: Vec<String>,
    /// Which of these are numbers to be used as such, standardised; a missing one counts as the mean.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dense: Vec<String>,
    /// What stands between the values of a `multi` column of strings.
    #[serde(default = "default_separator")]
    #[schemars(length(min = 1))]
    pub separator: String,
}

fn default_separator() -> String {
    "|".to_owned()
}

impl FieldsConfig {
    /// No field twice, and none in `multi` or `dense` that is not there.
    ///
    /// # Errors
    /// Exit 78, with the name.
    pub fn check(&self) -> Result<()> {
        let all: Vec<&String> = self.user.iter().chain(&self.item).chain(&self.row).collect();
        let mut seen = HashSet::new();
        for name in &all {
            if !seen.insert(name.as_str()) {
                return Err(Error::spec(format!("`fields` names `{name}` twice")));
            }
            if [USER_ID, ITEM_ID, RATING].contains(&name.as_str()) {
                return Err(Error::spec(format!("`fields` names `{name}`"))
                    .with_help("the ids are fields of every rating model, and the rating is what is predicted"));
            }
        }
        for name in self.multi.iter().chain(&self.dense) {
            if !seen.contains(name.as_str()) {
                return Err(Error::spec(format!(
                    "`{name}` is in `multi` or `dense` and in none of `user`, `item`, `row`"
                ))
                .with_help("say whose column it is too"));
            }
        }
        match self.multi.iter().find(|name| self.dense.contains(name)) {
            Some(name) => Err(Error::spec(format!("`{name}` is both in `multi` and in `dense`"))),
            None => Ok(()),
        }
    }

    /// The columns of a side.
    pub fn of(&self, side: Side) -> &[String] {
        match side {
            Side::User => &self.user,
            Side::Item => &self.item,
            Side::Row => &self.row,
        }
    }

    /// The columns of a side must be in the table that carries them.
    ///
    /// # Errors
    /// One is not (exit 65).
    pub fn check_schema(&self, side: Side, slot: &str, schema: Option<&SchemaRef>) -> Result<()> {
        let Some(schema) = schema else { return Ok(()) };
        match self.of(side).iter().find(|name| schema.field_with_name(name).is_err()) {
            None => Ok(()),
            Some(name) => {
                let there: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
                Err(Error::data(format!("input `{slot}` lacks the column `{name}` that `fields` names"))
                    .with_help(format!("it has: {}", there.join(", "))))
            }
        }
    }

    /// A column as it is used.
    ///
    /// # Errors
    /// It is missing, or has a type that cannot be used so (exit 65).
    pub fn read(&self, table: &Table, name: &str) -> Result<Column> {
        let column = table.column(name)?;
        if self.dense.iter().any(|n| n == name) {
            return numbers(table, name);
        }
        if self.multi.iter().any(|n| n == name) {
            return lists(table, name, &column, &self.separator);
        }
        categories(table, name, &column)
    }
}

fn numbers(table: &Table, name: &str) -> Result<Column> {
    let column = table.column_as(name, &DataType::Float64)?;
    Ok(Column::Number(column.as_primitive::<Float64Type>().iter().collect()))
}

fn categories(table: &Table, name: &str, column: &ArrayRef) -> Result<Column> {
    if column.data_type().is_integer() {
        let column = table.column_as(name, &DataType::Int64)?;
        return Ok(Column::Int(column.as_primitive::<Int64Type>().iter().collect()));
    }
    match column.data_type() {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Boolean | DataType::Dictionary(_, _) => {
            Ok(Column::Text(table.strings(name)?))
        }
        other => Err(Error::data(format!("column `{name}` has type {other}; integers or strings are categories"))
            .with_help("name it in `fields.dense` if it is a number, in `fields.multi` if it is a list, or cast it")),
    }
}

fn lists(table: &Table, name: &str, column: &ArrayRef, separator: &str) -> Result<Column> {
    let is_list =
        matches!(column.data_type(), DataType::List(_) | DataType::LargeList(_) | DataType::FixedSizeList(_, _));
    if !is_list {
        let split = |text: Option<String>| -> Vec<String> {
            let text = text.unwrap_or_default();
            text.split(separator).map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect()
        };
        return Ok(Column::Lists(table.strings(name)?.into_iter().map(split).collect()));
    }
    let strings = DataType::List(std::sync::Arc::new(arrow::datatypes::Field::new_list_field(DataType::Utf8, true)));
    let column = table.column_as(name, &strings)?;
    let rows = column.as_list::<i32>().iter().map(|row| match row {
        None => Vec::new(),
        Some(values) => values.as_string::<i32>().iter().flatten().map(str::to_owned).collect(),
    });
    Ok(Column::Lists(rows.collect()))
}

/// The entries of `column` in another order; `None` = missing.
fn reorder(column: &Column, rows: &[Option<usize>]) -> Column {
    match column {
        Column::Int(v) => Column::Int(rows.iter().map(|r| r.and_then(|r| v[r])).collect()),
        Column::Text(v) => Column::Text(rows.iter().map(|r| r.and_then(|r| v[r].clone())).collect()),
        Column::Lists(v) => Column::Lists(rows.iter().map(|r| r.map(|r| v[r].clone()).unwrap_or_default()).collect()),
        Column::Number(v) => Column::Number(rows.iter().map(|r| r.and_then(|r| v[r])).collect()),
    }
}

/// Which row of `table` each of `ids` has; `None` where it has none.
fn rows_of(table: &Table, slot: &str, id: &str, ids: &IdMap) -> Result<Vec<Option<usize>>> {
    let mut rows = vec![None; ids.len()];
    let column = table.ids(id).map_err(|e| e.at(format!("input `{slot}`")))?;
    for (row, index) in ids.encode(&column).into_iter().enumerate() {
        let Some(index) = index else { continue };
        if rows[index as usize].replace(row).is_some() {
            return Err(Error::data(format!("input `{slot}` has `{id}` {} twice", column.get(row)))
                .with_help("its columns are values of the one row per id; drop the repeats in a `sql` stage"));
        }
    }
    Ok(rows)
}

/// The columns of one side by index of `ids`; all missing where there is no table.
pub(in crate::stages) fn columns_by_id(
    config: &FieldsConfig,
    side: Side,
    table: Option<&Table>,
    (slot, id): (&str, &str),
    ids: &IdMap,
) -> Result<Vec<(String, Column)>> {
    let names = config.of(side);
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let Some(table) = table else {
        return Err(Error::spec(format!("`fields.{}` names columns, and there is no `{slot}` table", names_of(side)))
            .with_help(format!("name the table that carries them as `{slot}`")));
    };
    let rows = rows_of(table, slot, id, ids)?;
    names
        .iter()
        .map(|name| {
            let column = config.read(table, name).map_err(|e| e.at(format!("input `{slot}`")))?;
            Ok((name.clone(), reorder(&column, &rows)))
        })
        .collect()
}

fn names_of(side: Side) -> &'static str {
    match side {
        Side::User => "user",
        Side::Item => "item",
        Side::Row => "row",
    }
}

/// The columns of the rows themselves.
pub(in crate::stages) fn columns_of_rows(
    config: &FieldsConfig,
    table: &Table,
    slot: &str,
) -> Result<Vec<(String, Column)>> {
    let read =
        |name: &String| Ok((name.clone(), config.read(table, name).map_err(|e| e.at(format!("input `{slot}`")))?));
    config.row.iter().map(read).collect()
}

/// Learns a field of each column.
pub(in crate::stages) fn learn(side: Side, columns: &[(String, Column)]) -> Result<Vec<Field>> {
    columns.iter().map(|(name, column)| Field::learn(name, side, column)).collect()
}

/// Encodes the columns of a side in the order of the fields.
pub(in crate::stages) fn encode(fields: &FieldSet, side: Side, columns: &[(String, Column)]) -> Result<Vec<Values>> {
    fields
        .of(side)
        .map(|field| {
            let found = columns.iter().find(|(name, _)| *name == field.name);
            let (_, column) = found.ok_or_else(|| Error::internal(format!("field `{}` was not read", field.name)))?;
            field.encode(column)
        })
        .collect()
}

/// The config that reads what a model was fitted with.
pub(in crate::stages) fn config_of(fields: &FieldSet, separator: &str) -> FieldsConfig {
    let names = |side: Side| fields.of(side).map(|f| f.name.clone()).collect();
    let of_kind = |wanted: fn(&Kind) -> bool| {
        fields.fields.iter().filter(|f| wanted(&f.kind)).map(|f| f.name.clone()).collect::<Vec<_>>()
    };
    FieldsConfig {
        user: names(Side::User),
        item: names(Side::Item),
        row: names(Side::Row),
        multi: of_kind(|k| matches!(k, Kind::Multi { .. })),
        dense: of_kind(|k| matches!(k, Kind::Dense { .. })),
        separator: separator.to_owned(),
    }
}

/// The separator where the config has no `fields` at all.
pub(in crate::stages) fn separator_of(config: Option<&FieldsConfig>) -> String {
    config.map_or_else(default_separator, |c| c.separator.clone())
}

/// One after the other.
pub(in crate::stages) fn concat(first: &Values, second: &Values) -> Result<Values> {
    Ok(match (first, second) {
        (Values::Single(a), Values::Single(b)) => Values::Single([a.as_slice(), b].concat()),
        (Values::Dense(a), Values::Dense(b)) => Values::Dense([a.as_slice(), b].concat()),
        (Values::Multi { offsets: a, values: x }, Values::Multi { offsets: b, values: y }) => {
            let shift = x.len() as u32;
            let offsets = a.iter().copied().chain(b.iter().skip(1).map(|&o| o + shift)).collect();
            Values::Multi { offsets, values: [x.as_slice(), y].concat() }
        }
        _ => return Err(Error::internal("two columns of one field are of two kinds")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::IdColumn;
    use arrow::array::{Float32Array, Int32Array, Int64Array, ListBuilder, StringArray, StringBuilder};
    use std::sync::Arc;

    fn config() -> FieldsConfig {
        FieldsConfig {
            item: ["year", "genres", "tags", "length"].map(str::to_owned).to_vec(),
            multi: ["genres", "tags"].map(str::to_owned).to_vec(),
            dense: vec!["length".to_owned()],
            separator: "|".to_owned(),
            ..FieldsConfig::default()
        }
    }

    fn items() -> Table {
        let mut tags = ListBuilder::new(StringBuilder::new());
        tags.append_value([Some("x"), None, Some("y")]);
        tags.append_null();
        Table::from_columns(vec![
            (ITEM_ID, Arc::new(Int64Array::from(vec![20, 10])), false),
            ("year", Arc::new(Int32Array::from(vec![Some(1999), None])), true),
            ("genres", Arc::new(StringArray::from(vec![Some("War | Drama|"), None])), true),
            ("tags", Arc::new(tags.finish()), true),
            ("length", Arc::new(Float32Array::from(vec![Some(90.0), None])), true),
        ])
        .unwrap()
    }

    #[test]
    fn columns_come_in_the_order_of_the_ids() {
        let ids = IdMap::new(&[&IdColumn::Int(vec![10, 20, 30])]).unwrap();
        let columns = columns_by_id(&config(), Side::Item, Some(&items()), ("items", ITEM_ID), &ids).unwrap();
        let list = |v: &[&str]| v.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let want = [
            ("year", Column::Int(vec![None, Some(1999), None])),
            ("genres", Column::Lists(vec![vec![], list(&["War", "Drama"]), vec![]])),
            ("tags", Column::Lists(vec![vec![], list(&["x", "y"]), vec![]])),
            ("length", Column::Number(vec![None, Some(90.0), None])),
        ];
        assert_eq!(columns, want.map(|(n, c)| (n.to_owned(), c)));
        let fields = learn(Side::Item, &columns).unwrap();
        let set = FieldSet { n_users: 0, n_items: 3, fields };
        assert_eq!(encode(&set, Side::Item, &columns).unwrap().len(), 4);
        let read = config_of(&set, "|");
        assert_eq!(read, config());
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let ids = IdMap::new(&[&IdColumn::Int(vec![10])]).unwrap();
        let read = |config: &FieldsConfig, table: Option<&Table>| {
            columns_by_id(config, Side::Item, table, ("items", ITEM_ID), &ids).err().unwrap()
        };
        let error = read(&FieldsConfig { dense: vec![], ..config() }, Some(&items()));
        assert!(error.fault.exit_code() == 65 && error.message.contains("`length`"), "{error}");
        let error = read(&FieldsConfig { item: vec!["colour".to_owned()], ..config() }, Some(&items()));
        assert!(error.message.contains("`colour`") && error.message.contains("`items`"), "{error}");
        assert_eq!(read(&config(), None).fault.exit_code(), 78);
        let twice = Table::from_columns(vec![
            (ITEM_ID, Arc::new(Int64Array::from(vec![10, 10])), false),
            ("year", Arc::new(Int64Array::from(vec![1, 2])), false),
        ]);
        let error = read(&FieldsConfig { item: vec!["year".to_owned()], ..config() }, Some(&twice.unwrap()));
        assert!(error.message.contains("10 twice"), "{error}");
    }

    #[test]
    fn a_config_that_contradicts_itself_is_refused() {
        config().check().unwrap();
        for (config, word) in [
            (FieldsConfig { user: vec!["year".to_owned()], ..config() }, "twice"),
            (FieldsConfig { multi: vec!["colour".to_owned()], ..config() }, "`colour`"),
            (FieldsConfig { multi: vec!["length".to_owned()], ..config() }, "both"),
            (FieldsConfig { row: vec!["rating".to_owned()], ..config() }, "`rating`"),
        ] {
            let error = config.check().unwrap_err();
            assert!(error.fault.exit_code() == 78 && error.message.contains(word), "{error}");
        }
    }

    #[test]
    fn values_are_joined() {
        let multi =
            |offsets: &[u32], values: &[u32]| Values::Multi { offsets: offsets.to_vec(), values: values.to_vec() };
        assert_eq!(
            concat(&multi(&[0, 1, 3], &[5, 6, 7]), &multi(&[0, 2], &[8, 9])).unwrap(),
            multi(&[0, 1, 3, 5], &[5, 6, 7, 8, 9])
        );
        assert!(concat(&Values::Dense(vec![]), &Values::Single(vec![])).is_err());
    }
}
