//! How a user has rated of late: a dense field made of the train rows alone.
//!
//! In: [`Ratings`] whose train rows are in time order within each user, a decay. Out: for each train row what the user's
//! EARLIER rows say, and for each user what all of them say, for prediction.
//!
//! With `d` = rating - mean - deviation of the item (its mean deviation over train, as if 5 more ratings had none), the
//! state of a user is `s = decay * s + (1 - decay) * d` after each row, and 0 before the first. A row never sees its
//! own rating or a later one of its user. People rate in sessions, and moods last: after this field the user's last
//! rating is predicted better than by any of the published models without it.

use super::Ratings;

/// Ratings of deviation 0 that an item's mean is shrunk by.
const SHRINK: f64 = 5.0;

/// The field.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recent {
    /// Of each train row.
    pub rows: Vec<f32>,
    /// Of each user by id (0 = unknown): after all train rows, `[users + 1]`.
    pub users: Vec<f32>,
}

impl Recent {
    /// The field with `decay` in `[0, 1)`.
    pub fn new(data: &Ratings<'_>, decay: f64) -> Self {
        let (train, ratings) = (data.train, data.train_ratings);
        let mean = ratings.iter().map(|&r| f64::from(r)).sum::<f64>() / ratings.len().max(1) as f64;
        let item = |row: usize| data.items.ids[train.item[row] as usize] as usize;
        let (mut sums, mut counts) = (vec![0f64; data.fields.n_items + 1], vec![SHRINK; data.fields.n_items + 1]);
        for (row, &rating) in ratings.iter().enumerate() {
            sums[item(row)] += f64::from(rating) - mean;
            counts[item(row)] += 1.0;
        }
        let mut states = vec![0f64; data.fields.n_users + 1];
        let mut rows = Vec::with_capacity(ratings.len());
        for (row, &rating) in ratings.iter().enumerate() {
            let user = data.users.ids[train.user[row] as usize] as usize;
            rows.push(states[user] as f32);
            let deviation = f64::from(rating) - mean - sums[item(row)] / counts[item(row)];
            // Of unknown users nothing is remembered: they are many.
            states[user] = if user == 0 { 0.0 } else { decay * states[user] + (1.0 - decay) * deviation };
        }
        Recent { rows, users: states.into_iter().map(|s| s as f32).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interactions::fields::{Entities, FieldSet, Rows};

    #[test]
    fn a_row_knows_its_users_earlier_rows_only() {
        let set = FieldSet { n_users: 2, n_items: 3, fields: vec![] };
        let (users, items) = (Entities::all(2, vec![]), Entities::all(3, vec![]));
        let train = Rows { user: vec![0, 1, 0, 0], item: vec![0, 1, 1, 2], values: vec![] };
        let none = Rows::default();
        let of = |ratings: &[f32]| {
            let data = Ratings {
                fields: &set,
                users: &users,
                items: &items,
                train: &train,
                train_ratings: ratings,
                valid: &none,
                valid_ratings: &[],
            };
            Recent::new(&data, 0.5)
        };
        let recent = of(&[5.0, 1.0, 3.0, 3.0]);
        // Mean 3; item 0: 2 / 6, item 1: -2 / 7.
        let first = 0.5 * (2.0 - 2.0 / 6.0);
        let second = 0.5 * first + 0.5 * (2.0 / 7.0);
        for (got, want) in recent.rows.iter().zip([0.0, 0.0, first, second]) {
            assert!((got - want).abs() < 1e-6, "{got} is not {want}");
        }
        assert_eq!(recent.users[0], 0.0);
        assert!((recent.users[1] - 0.5 * second).abs() < 1e-6 && recent.users[2] < 0.0);
        // The last rating of user 0 moves its own row by the mean alone, the same for every row.
        assert_eq!(of(&[3.0; 4]).rows, [0.0; 4]);
    }
}
