//! What is known of users, items and ratings besides their ids, in the form that rating models take.
//!
//! In: columns as a user has them ([`Column`]: integers, strings, lists of strings, numbers, each perhaps missing).
//! Out: a [`FieldSet`] (names, places and vocabularies; saved beside the weights, so that prediction encodes as
//! training did) and the encoded values: [`Entities`] once per user and once per item, [`Rows`] once per rating.
//!
//! * A categorical value is its place among the field's sorted distinct values, plus 1; 0 stands for a value that is
//!   missing or not in the vocabulary.
//! * The ids of user and item are the first two fields of every model and are not listed in [`FieldSet::fields`]: their
//!   vocabularies are the id maps. A user or item that the model does not know has id 0, and may have side values.
//! * A list is pooled by its mean; values that the vocabulary does not hold are left out of it.
//! * A number is standardised by the mean and deviation of the column that the field was learned from; missing = the
//!   mean = 0.
//!
//! ```ignore
//! let age = Field::learn("age", Side::User, &ages)?;                    // ages: one per user, by user index
//! let genres = Field::learn("genres", Side::Item, &genre_lists)?;       // one list per item
//! let users = Entities::all(n_users, vec![age.encode(&ages)?]);
//! let items = Entities::all(n_items, vec![genres.encode(&genre_lists)?]);
//! let set = FieldSet { n_users, n_items, fields: vec![age, genres] };
//! let rows = Rows { user, item, values: vec![] };                       // no field has Side::Row
//! set.check(&users, &items, &rows)?;
//! ```

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Whose property a field is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The user's (age, occupation).
    User,
    /// The item's (genres, year).
    Item,
    /// The single rating's (device, hour).
    Row,
}

/// A column before it is encoded: one entry per user, per item or per row.
#[derive(Clone, Debug, PartialEq)]
pub enum Column {
    /// Categories that are integers.
    Int(Vec<Option<i64>>),
    /// Categories that are strings.
    Text(Vec<Option<String>>),
    /// Several categories each; an empty list = missing.
    Lists(Vec<Vec<String>>),
    /// A number that is used as one; `None` and NaN = missing.
    Number(Vec<Option<f64>>),
}

/// Sorted distinct values of a categorical field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vocabulary {
    /// Integers.
    Int(Vec<i64>),
    /// Strings.
    Text(Vec<String>),
}

/// How a field's values are encoded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// One category.
    Single {
        /// Its values.
        vocabulary: Vocabulary,
    },
    /// Several categories.
    Multi {
        /// Their values.
        vocabulary: Vec<String>,
    },
    /// A number `x`, encoded as `(x - mean) / deviation`.
    Dense {
        /// Mean of the column that the field was learned from.
        mean: f32,
        /// Its standard deviation; 1 where all its values are the same.
        deviation: f32,
    },
}

/// A field: its name, whose property it is, and how it is encoded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Field {
    /// Name of the column.
    pub name: String,
    /// Whose property it is.
    pub side: Side,
    /// How it is encoded.
    pub kind: Kind,
}

/// Encoded values of a field, one entry per user, per item or per row.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// One category each: 0 = unknown, else 1 + place in the vocabulary.
    Single(Vec<u32>),
    /// Several categories each; entry `n` has `values[offsets[n]..offsets[n + 1]]`, at least one (0 where it is unknown).
    Multi {
        /// `[entries + 1]`.
        offsets: Vec<u32>,
        /// As in [`Values::Single`], distinct and ascending within an entry.
        values: Vec<u32>,
    },
    /// Standardised numbers.
    Dense(Vec<f32>),
}

/// The users or the items of some rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Entities {
    /// Which user or item of the model each one is: 0 = none that it knows, else 1 + dense index.
    pub ids: Vec<u32>,
    /// Values of the fields of this side in the order of [`FieldSet::fields`]; each has `ids.len()` entries.
    pub values: Vec<Values>,
}

/// Pairs of a user and an item, with what is known of the pair.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    /// Index into the users' [`Entities`].
    pub user: Vec<u32>,
    /// Index into the items' [`Entities`].
    pub item: Vec<u32>,
    /// Values of the fields of [`Side::Row`] in the order of [`FieldSet::fields`]; each has `user.len()` entries.
    pub values: Vec<Values>,
}

/// All fields of a model besides the two ids.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FieldSet {
    /// Number of users that the model knows.
    pub n_users: usize,
    /// Number of items that the model knows.
    pub n_items: usize,
    /// The other fields.
    pub fields: Vec<Field>,
}

impl Column {
    /// Number of entries.
    pub fn len(&self) -> usize {
        match self {
            Column::Int(v) => v.len(),
            Column::Text(v) => v.len(),
            Column::Lists(v) => v.len(),
            Column::Number(v) => v.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn what(&self) -> &'static str {
        match self {
            Column::Int(_) => "integers",
            Column::Text(_) => "strings",
            Column::Lists(_) => "lists of strings",
            Column::Number(_) => "numbers",
        }
    }
}

impl Values {
    /// Number of entries.
    pub fn len(&self) -> usize {
        match self {
            Values::Single(v) => v.len(),
            Values::Multi { offsets, .. } => offsets.len().saturating_sub(1),
            Values::Dense(v) => v.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Field {
    /// A field with the vocabulary (or mean and deviation) of `column`: integers and strings become a single
    /// category, lists several, numbers a dense field. For a field of [`Side::Row`] give the train rows only.
    ///
    /// # Errors
    /// A number is infinite (exit 65).
    pub fn learn(name: &str, side: Side, column: &Column) -> Result<Self> {
        let kind = match column {
            Column::Int(v) => Kind::Single { vocabulary: Vocabulary::Int(distinct(v.iter().flatten().copied())) },
            Column::Text(v) => Kind::Single { vocabulary: Vocabulary::Text(distinct(v.iter().flatten().cloned())) },
            Column::Lists(v) => Kind::Multi { vocabulary: distinct(v.iter().flatten().cloned()) },
            Column::Number(v) => {
                let known = finite(name, v)?;
                let n = known.len().max(1) as f64;
                let mean = known.iter().sum::<f64>() / n;
                let deviation = (known.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt() as f32;
                let deviation = if deviation.is_normal() { deviation } else { 1.0 };
                Kind::Dense { mean: mean as f32, deviation }
            }
        };
        Ok(Field { name: name.to_owned(), side, kind })
    }

    /// Encodes a column.
    ///
    /// # Errors
    /// It has another type than the one that the field was learned from, or a number is infinite (exit 65).
    pub fn encode(&self, column: &Column) -> Result<Values> {
        match (&self.kind, column) {
            (Kind::Single { vocabulary: Vocabulary::Int(known) }, Column::Int(v)) => Ok(single(known, v)),
            (Kind::Single { vocabulary: Vocabulary::Text(known) }, Column::Text(v)) => Ok(single(known, v)),
            (Kind::Multi { vocabulary }, Column::Lists(v)) => {
                let index = index_of(vocabulary);
                let (mut offsets, mut values) = (vec![0u32], Vec::new());
                for list in v {
                    let mut known = distinct(list.iter().filter_map(|x| index.get(x).copied()));
                    if known.is_empty() {
                        known.push(0);
                    }
                    values.append(&mut known);
                    offsets.push(values.len() as u32);
                }
                Ok(Values::Multi { offsets, values })
            }
            (&Kind::Dense { mean, deviation }, Column::Number(v)) => {
                finite(&self.name, v)?;
                let encode = |x: &Option<f64>| x.filter(|x| !x.is_nan()).map_or(0.0, |x| (x as f32 - mean) / deviation);
                Ok(Values::Dense(v.iter().map(encode).collect()))
            }
            (_, found) => Err(Error::data(format!(
                "field `{}` holds {}, the model learned it from {}",
                self.name,
                found.what(),
                self.what()
            ))
            .with_help("cast the column in a `sql` stage, or train again")),
        }
    }

    /// Number of embeddings, the one of unknown values included; 0 for a dense field.
    pub fn size(&self) -> usize {
        match &self.kind {
            Kind::Single { vocabulary: Vocabulary::Int(known) } => known.len() + 1,
            Kind::Single { vocabulary: Vocabulary::Text(known) } => known.len() + 1,
            Kind::Multi { vocabulary } => vocabulary.len() + 1,
            Kind::Dense { .. } => 0,
        }
    }

    fn what(&self) -> &'static str {
        match &self.kind {
            Kind::Single { vocabulary: Vocabulary::Int(_) } => "integers",
            Kind::Single { vocabulary: Vocabulary::Text(_) } => "strings",
            Kind::Multi { .. } => "lists of strings",
            Kind::Dense { .. } => "numbers",
        }
    }

    /// Whether `values` are of this field's kind and inside its vocabulary.
    fn fits(&self, values: &Values) -> bool {
        let size = self.size() as u32;
        match (&self.kind, values) {
            (Kind::Single { .. }, Values::Single(v)) => v.iter().all(|&x| x < size),
            (Kind::Multi { .. }, Values::Multi { offsets, values }) => {
                offsets.windows(2).all(|w| w[0] < w[1])
                    && offsets.first() == Some(&0)
                    && offsets.last().copied() == u32::try_from(values.len()).ok()
                    && values.iter().all(|&x| x < size)
            }
            (Kind::Dense { .. }, Values::Dense(v)) => v.iter().all(|x| x.is_finite()),
            _ => false,
        }
    }
}

impl Entities {
    /// All users, or all items, of the model in the order of their indices.
    pub fn all(n: usize, values: Vec<Values>) -> Self {
        Entities { ids: (1..=n as u32).collect(), values }
    }
}

impl Rows {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.user.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.user.is_empty()
    }
}

impl FieldSet {
    /// The fields of one side.
    pub fn of(&self, side: Side) -> impl Iterator<Item = &Field> {
        self.fields.iter().filter(move |f| f.side == side)
    }

    /// Checks that entities and rows are what these fields describe, so that a model may index without asking.
    ///
    /// # Errors
    /// They are not (exit 65; the field or the place is named).
    pub fn check(&self, users: &Entities, items: &Entities, rows: &Rows) -> Result<()> {
        let sides = [
            (Side::User, &users.values, users.ids.len(), "user"),
            (Side::Item, &items.values, items.ids.len(), "item"),
            (Side::Row, &rows.values, rows.len(), "row"),
        ];
        for (side, values, n, what) in sides {
            let fields: Vec<&Field> = self.of(side).collect();
            if fields.len() != values.len() {
                let told = format!("the model has {} fields per {what}, the data has {}", fields.len(), values.len());
                return Err(Error::data(told).with_help("give the columns that the model was trained with"));
            }
            for (field, values) in fields.iter().zip(values) {
                if values.len() != n {
                    let told = format!("field `{}` has {} values for {n} {what}s", field.name, values.len());
                    return Err(Error::data(told));
                }
                if !field.fits(values) {
                    return Err(Error::data(format!("the values of field `{}` are not of its kind", field.name))
                        .with_help("encode them by the fields of this model"));
                }
            }
        }
        let inside = |v: &[u32], n: usize| v.iter().all(|&x| (x as usize) < n);
        let known = inside(&users.ids, self.n_users + 1) && inside(&items.ids, self.n_items + 1);
        let placed = inside(&rows.user, users.ids.len()) && inside(&rows.item, items.ids.len());
        match known && placed && rows.user.len() == rows.item.len() {
            true => Ok(()),
            false => Err(Error::data("a user or an item of the rows is not among those that were given")),
        }
    }
}

fn distinct<T: Ord>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut all: Vec<T> = values.collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn index_of<T: Eq + std::hash::Hash>(vocabulary: &[T]) -> HashMap<&T, u32> {
    vocabulary.iter().enumerate().map(|(n, v)| (v, n as u32 + 1)).collect()
}

fn single<T: Eq + std::hash::Hash>(vocabulary: &[T], column: &[Option<T>]) -> Values {
    let index = index_of(vocabulary);
    Values::Single(column.iter().map(|v| v.as_ref().and_then(|v| index.get(v).copied()).unwrap_or(0)).collect())
}

/// The known values of a column of numbers.
fn finite(name: &str, column: &[Option<f64>]) -> Result<Vec<f64>> {
    if let Some(place) = column.iter().position(|x| x.is_some_and(f64::is_infinite)) {
        return Err(Error::data(format!("field `{name}` is infinite in entry {place} (0-based)"))
            .with_help("make it null in a `sql` stage: a missing number counts as the mean"));
    }
    Ok(column.iter().flatten().copied().filter(|x| !x.is_nan()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(values: &[&str]) -> Column {
        Column::Text(values.iter().map(|v| (!v.is_empty()).then(|| (*v).to_owned())).collect())
    }

    fn lists(values: &[&[&str]]) -> Column {
        Column::Lists(values.iter().map(|l| l.iter().map(|v| (*v).to_owned()).collect()).collect())
    }

    #[test]
    fn categories_are_places_among_sorted_values_and_0_is_unknown() {
        let field = Field::learn("job", Side::User, &text(&["nurse", "", "artist", "nurse"])).unwrap();
        assert_eq!(field.size(), 3);
        let encoded = field.encode(&text(&["artist", "nurse", "", "pilot"])).unwrap();
        assert_eq!(encoded, Values::Single(vec![1, 2, 0, 0]));
        let year = Field::learn("year", Side::Item, &Column::Int(vec![Some(1999), None, Some(-3)])).unwrap();
        let encoded = year.encode(&Column::Int(vec![Some(1999), Some(-3), None, Some(2000)])).unwrap();
        assert_eq!(encoded, Values::Single(vec![2, 1, 0, 0]));
    }

    #[test]
    fn lists_hold_each_known_value_once_and_are_never_empty() {
        let field = Field::learn("genres", Side::Item, &lists(&[&["War", "Drama"], &[], &["Drama"]])).unwrap();
        let encoded = field.encode(&lists(&[&["War", "Drama", "War"], &[], &["Noir"], &["Noir", "War"]])).unwrap();
        assert_eq!(encoded, Values::Multi { offsets: vec![0, 2, 3, 4, 5], values: vec![1, 2, 0, 0, 2] });
        assert_eq!(encoded.len(), 4);
    }

    #[test]
    fn numbers_are_standardised_and_a_missing_one_is_the_mean() {
        let field = Field::learn("x", Side::Row, &Column::Number(vec![Some(1.0), Some(3.0), None])).unwrap();
        let encoded = field.encode(&Column::Number(vec![Some(3.0), None, Some(f64::NAN), Some(5.0)])).unwrap();
        assert_eq!(encoded, Values::Dense(vec![1.0, 0.0, 0.0, 3.0]));
        for empty in [vec![], vec![None], vec![Some(4.0); 3]] {
            let field = Field::learn("x", Side::Row, &Column::Number(empty)).unwrap();
            assert!(matches!(field.kind, Kind::Dense { deviation: 1.0, .. }));
        }
        let error = Field::learn("x", Side::Row, &Column::Number(vec![None, Some(f64::INFINITY)])).unwrap_err();
        assert_eq!(error.fault.exit_code(), 65);
        assert!(error.message.contains("`x`") && error.message.contains("entry 1"), "{}", error.message);
    }

    #[test]
    fn a_column_of_another_type_is_refused_by_name() {
        let field = Field::learn("job", Side::User, &text(&["nurse"])).unwrap();
        let error = field.encode(&Column::Int(vec![Some(1)])).unwrap_err();
        assert_eq!(error.fault.exit_code(), 65);
        assert!(error.message.contains("`job`") && error.message.contains("integers"), "{}", error.message);
    }

    #[test]
    fn what_does_not_fit_the_fields_is_refused() {
        let job = Field::learn("job", Side::User, &text(&["nurse", "artist"])).unwrap();
        let users = Entities::all(2, vec![job.encode(&text(&["nurse", ""])).unwrap()]);
        let items = Entities::all(3, vec![]);
        let set = FieldSet { n_users: 2, n_items: 3, fields: vec![job] };
        let rows = Rows { user: vec![1, 0], item: vec![2, 2], values: vec![] };
        set.check(&users, &items, &rows).unwrap();
        let bad = [
            (Entities { values: vec![], ..users.clone() }, rows.clone()),
            (Entities { values: vec![Values::Single(vec![1])], ..users.clone() }, rows.clone()),
            (Entities { values: vec![Values::Single(vec![1, 3])], ..users.clone() }, rows.clone()),
            (Entities { values: vec![Values::Dense(vec![1.0, 3.0])], ..users.clone() }, rows.clone()),
            (Entities { ids: vec![1, 3], ..users.clone() }, rows.clone()),
            (users.clone(), Rows { user: vec![2, 0], ..rows.clone() }),
            (users.clone(), Rows { item: vec![0], ..rows.clone() }),
        ];
        for (users, rows) in bad {
            assert_eq!(set.check(&users, &items, &rows).unwrap_err().fault.exit_code(), 65);
        }
    }

    #[test]
    fn the_set_survives_json_with_the_same_bytes() {
        let set = FieldSet {
            n_users: 2,
            n_items: 3,
            fields: vec![
                Field::learn("job", Side::User, &text(&["nurse", "artist"])).unwrap(),
                Field::learn("year", Side::Item, &Column::Int(vec![Some(1999)])).unwrap(),
                Field::learn("genres", Side::Item, &lists(&[&["War"]])).unwrap(),
                Field::learn("x", Side::Row, &Column::Number(vec![Some(0.1), Some(0.7)])).unwrap(),
            ],
        };
        let json = serde_json::to_string(&set).unwrap();
        let read: FieldSet = serde_json::from_str(&json).unwrap();
        assert_eq!(read, set);
        assert_eq!(serde_json::to_string(&read).unwrap(), json);
    }
}
