//! Where the values of all fields lie in the one embedding table, and batches of table rows.
//!
//! In: a [`FieldSet`], encoded entities and rows. Out: a [`Layout`] (known from the fields alone) and a [`Batch`] (plain
//! numbers, no tensors).
//!
//! The table holds the users' ids (unknown, then user 0, 1, ..), the items' ids, and the values of the other categorical
//! fields in the order of the set. A model sees the fields in the order: user id, item id, those with one category,
//! those with several.

use crate::interactions::fields::{Entities, FieldSet, Kind, Rows, Side, Values};

/// A field in the table.
#[derive(Clone, Copy, Debug)]
struct Place {
    side: Side,
    /// Which one of [`Entities::values`] or [`Rows::values`].
    column: usize,
    /// First row in the table.
    first: u32,
}

/// Which rows of the table belong to which field.
#[derive(Clone, Debug)]
pub struct Layout {
    n_users: usize,
    single: Vec<Place>,
    multi: Vec<Place>,
    dense: Vec<(Side, usize)>,
    rows: usize,
}

/// Rows of the table for some ratings.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Number of ratings.
    pub n: usize,
    /// Rows of the table: `[n, singles]` one after another, then the values of the lists.
    pub rows: Vec<u32>,
    /// For each value of a list where it is added: `rating * multis + field`.
    pub owners: Vec<i32>,
    /// For each value of a list its share of the mean: 1 / length of the list.
    pub shares: Vec<f32>,
    /// `[n, denses]`, standardised.
    pub dense: Vec<f32>,
}

impl Layout {
    /// The layout of `fields`.
    pub fn new(fields: &FieldSet) -> Self {
        let mut layout = Layout {
            n_users: fields.n_users,
            single: Vec::new(),
            multi: Vec::new(),
            dense: Vec::new(),
            rows: fields.n_users + fields.n_items + 2,
        };
        let mut columns = [0usize; 3];
        for field in &fields.fields {
            let column = &mut columns[field.side as usize];
            let place = Place { side: field.side, column: *column, first: layout.rows as u32 };
            *column += 1;
            layout.rows += field.size();
            match field.kind {
                Kind::Single { .. } => layout.single.push(place),
                Kind::Multi { .. } => layout.multi.push(place),
                Kind::Dense { .. } => layout.dense.push((place.side, place.column)),
            }
        }
        layout
    }

    /// Rows of the table.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// First row of the items' ids: the one of unknown items.
    pub fn first_item(&self) -> usize {
        self.n_users + 1
    }

    /// Fields with one category, the two ids included.
    pub fn singles(&self) -> usize {
        self.single.len() + 2
    }

    /// Fields with several categories.
    pub fn multis(&self) -> usize {
        self.multi.len()
    }

    /// All categorical fields.
    pub fn categorical(&self) -> usize {
        self.singles() + self.multis()
    }

    /// Dense fields.
    pub fn denses(&self) -> usize {
        self.dense.len()
    }

    /// The batch of the rows at `places`. The rows must have passed [`FieldSet::check`].
    pub fn batch(&self, users: &Entities, items: &Entities, rows: &Rows, places: &[u32]) -> Batch {
        let n = places.len();
        let mut batch =
            Batch { n, rows: Vec::with_capacity(n * (self.singles() + 4 * self.multis())), ..Batch::default() };
        // Which entry of a side's columns a rating reads.
        let entry = |side: Side, place: usize| match side {
            Side::User => (&users.values, rows.user[place] as usize),
            Side::Item => (&items.values, rows.item[place] as usize),
            Side::Row => (&rows.values, place),
        };
        for &place in places {
            let place = place as usize;
            batch.rows.push(users.ids[rows.user[place] as usize]);
            batch.rows.push(self.first_item() as u32 + items.ids[rows.item[place] as usize]);
            for field in &self.single {
                let (values, at) = entry(field.side, place);
                if let Values::Single(v) = &values[field.column] {
                    batch.rows.push(field.first + v[at]);
                }
            }
            for &(side, column) in &self.dense {
                let (values, at) = entry(side, place);
                if let Values::Dense(v) = &values[column] {
                    batch.dense.push(v[at]);
                }
            }
        }
        for (b, &place) in places.iter().enumerate() {
            for (m, field) in self.multi.iter().enumerate() {
                let (values, at) = entry(field.side, place as usize);
                if let Values::Multi { offsets, values } = &values[field.column] {
                    let list = &values[offsets[at] as usize..offsets[at + 1] as usize];
                    batch.rows.extend(list.iter().map(|v| field.first + v));
                    batch.owners.extend(list.iter().map(|_| (b * self.multis() + m) as i32));
                    batch.shares.extend(list.iter().map(|_| 1.0 / list.len() as f32));
                }
            }
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interactions::fields::{Column, Field};

    #[test]
    fn a_batch_has_ids_then_single_categories_then_lists() {
        let ages = Column::Int(vec![Some(30), None]);
        let genres = Column::Lists(vec![vec!["b".into(), "a".into()], vec![], vec!["b".into()]]);
        let hours = Column::Number(vec![Some(1.0), Some(3.0), Some(2.0)]);
        let days = Column::Text(vec![Some("mo".into()), Some("tu".into()), None]);
        let genre = Field::learn("genres", Side::Item, &genres).unwrap();
        let age = Field::learn("age", Side::User, &ages).unwrap();
        let hour = Field::learn("hour", Side::Row, &hours).unwrap();
        let day = Field::learn("day", Side::Row, &days).unwrap();
        let users = Entities::all(2, vec![age.encode(&ages).unwrap()]);
        let items = Entities { ids: vec![1, 0, 3], values: vec![genre.encode(&genres).unwrap()] };
        let values = vec![hour.encode(&hours).unwrap(), day.encode(&days).unwrap()];
        let rows = Rows { user: vec![0, 1, 0], item: vec![0, 1, 2], values };
        let set = FieldSet { n_users: 2, n_items: 3, fields: vec![genre, age, hour, day] };
        set.check(&users, &items, &rows).unwrap();
        let layout = Layout::new(&set);
        assert_eq!((layout.singles(), layout.multis(), layout.denses(), layout.first_item()), (4, 1, 1, 3));
        // Users 0..3, items 3..7, genres 7..10, ages 10..12, days 12..15.
        assert_eq!(layout.rows(), 15);
        let batch = layout.batch(&users, &items, &rows, &[2, 0, 1]);
        assert_eq!(batch.rows, [1, 6, 11, 12, 1, 4, 11, 13, 2, 3, 10, 14, 9, 8, 9, 7]);
        assert_eq!(batch.owners, [0, 1, 1, 2]);
        assert_eq!(batch.shares, [1.0, 0.5, 0.5, 1.0]);
        assert!(batch.dense[0].abs() < 1e-6 && batch.dense[1] < 0.0 && batch.dense[2] > 0.0);
    }
}
