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
    recent: bool,
}

/// Where a batch comes from. The rows must have passed [`FieldSet::check`].
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Users of the rows.
    pub users: &'a Entities,
    /// Items of the rows.
    pub items: &'a Entities,
    /// The rows.
    pub rows: &'a Rows,
    /// How the users have rated of late, if the layout has that field.
    pub recent: RecentOf<'a>,
}

/// Values of [`Recent`](super::recent::Recent).
#[derive(Clone, Copy, Debug)]
pub enum RecentOf<'a> {
    /// The layout has no such field.
    None,
    /// One per row.
    Rows(&'a [f32]),
    /// One per user id, `[users + 1]`.
    Users(&'a [f32]),
}

/// Rows of the table for some ratings.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Number of ratings.
    pub n: usize,
    /// The rows of the table that occur, ascending and distinct.
    pub rows: Vec<u32>,
    /// How often each of them occurs.
    pub counts: Vec<f32>,
    /// `[n * fields + 1]`: where the values of each rating's fields begin in `places`.
    pub offsets: Vec<usize>,
    /// Places in `rows`, ascending within a field.
    pub places: Vec<u32>,
    /// For each of `places` its share of the mean: 1 / number of values.
    pub shares: Vec<f32>,
    /// `[n, denses]`, standardised.
    pub dense: Vec<f32>,
}

/// Memory that batches share: for each row of the table its place in the current batch.
#[derive(Clone, Debug)]
pub struct Scratch(Vec<u32>);

/// No place.
const NONE: u32 = u32::MAX;

impl Layout {
    /// The layout of `fields`, perhaps with one more dense field: how the user has rated of late.
    pub fn new(fields: &FieldSet, recent: bool) -> Self {
        let mut layout = Layout {
            n_users: fields.n_users,
            single: Vec::new(),
            multi: Vec::new(),
            dense: Vec::new(),
            rows: fields.n_users + fields.n_items + 2,
            recent,
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
        self.dense.len() + usize::from(self.recent)
    }

    /// Memory for [`Layout::batch`].
    pub fn scratch(&self) -> Scratch {
        Scratch(vec![NONE; self.rows])
    }

    /// The batch of the rows at `places`.
    pub fn batch(&self, source: Source<'_>, places: &[u32], scratch: &mut Scratch) -> Batch {
        let Source { users, items, rows, recent } = source;
        let n = places.len();
        let values = n * (self.singles() + 4 * self.multis());
        let mut batch = Batch { n, places: Vec::with_capacity(values), ..Batch::default() };
        batch.offsets.reserve(n * self.categorical() + 1);
        batch.offsets.push(0);
        let seen = &mut scratch.0;
        for &place in places {
            let place = place as usize;
            // Which entry of a side's columns a rating reads.
            let entry = |side: Side| match side {
                Side::User => (&users.values, rows.user[place] as usize),
                Side::Item => (&items.values, rows.item[place] as usize),
                Side::Row => (&rows.values, place),
            };
            let ids =
                [users.ids[rows.user[place] as usize], self.first_item() as u32 + items.ids[rows.item[place] as usize]];
            let single = |field: &Place| {
                let (values, at) = entry(field.side);
                match &values[field.column] {
                    Values::Single(v) => field.first + v[at],
                    _ => field.first,
                }
            };
            for row in ids.into_iter().chain(self.single.iter().map(single)) {
                batch.places.push(row);
                batch.shares.push(1.0);
                batch.offsets.push(batch.places.len());
            }
            for field in &self.multi {
                let (values, at) = entry(field.side);
                if let Values::Multi { offsets, values } = &values[field.column] {
                    let list = &values[offsets[at] as usize..offsets[at + 1] as usize];
                    batch.places.extend(list.iter().map(|v| field.first + v));
                    batch.shares.resize(batch.places.len(), 1.0 / list.len() as f32);
                }
                batch.offsets.push(batch.places.len());
            }
            for &(side, column) in &self.dense {
                let (values, at) = entry(side);
                if let Values::Dense(v) = &values[column] {
                    batch.dense.push(v[at]);
                }
            }
            match recent {
                RecentOf::None => {}
                RecentOf::Rows(values) => batch.dense.push(values[place]),
                RecentOf::Users(values) => batch.dense.push(values[ids[0] as usize]),
            }
        }
        // `places` are rows of the table so far.
        for &row in &batch.places {
            if seen[row as usize] == NONE {
                seen[row as usize] = 0;
                batch.rows.push(row);
            }
        }
        batch.rows.sort_unstable();
        for (n, &row) in batch.rows.iter().enumerate() {
            seen[row as usize] = n as u32;
        }
        batch.counts.resize(batch.rows.len(), 0.0);
        for place in &mut batch.places {
            *place = seen[*place as usize];
            batch.counts[*place as usize] += 1.0;
        }
        for &row in &batch.rows {
            seen[row as usize] = NONE;
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
        let layout = Layout::new(&set, false);
        assert_eq!((layout.singles(), layout.multis(), layout.denses(), layout.first_item()), (4, 1, 1, 3));
        // Users 0..3, items 3..7, genres 7..10, ages 10..12, days 12..15.
        assert_eq!(layout.rows(), 15);
        let source = Source { users: &users, items: &items, rows: &rows, recent: RecentOf::None };
        let mut scratch = layout.scratch();
        for _ in 0..2 {
            let batch = layout.batch(source, &[2, 0, 1], &mut scratch);
            let rows: Vec<u32> = batch.places.iter().map(|&p| batch.rows[p as usize]).collect();
            assert_eq!(rows, [1, 6, 11, 12, 9, 1, 4, 11, 13, 8, 9, 2, 3, 10, 14, 7]);
            assert_eq!(batch.offsets, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16]);
            assert!(batch.rows.is_sorted());
            assert_eq!(batch.counts, [2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 2.0, 1.0, 1.0, 1.0]);
            assert_eq!((batch.shares[8], batch.shares[9], batch.shares[10]), (1.0, 0.5, 0.5));
            assert!(batch.dense[0].abs() < 1e-6 && batch.dense[1] < 0.0 && batch.dense[2] > 0.0);
        }
    }
}
