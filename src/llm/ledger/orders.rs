//! The second level of the ledger: the order that the LLM gave a user's shortlist, for when the shortlist changes a little.
//!
//! In: orders, by user, what was known of the user, and how the LLM was asked. Out: the newest order of a user whose
//! history is the same, and [`carry_over`], which makes an order of today's shortlist out of it. The recommender is
//! trained again every night, so the shortlist, and with it the prompt, of a user who did nothing changes too.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, AsArray, Float32Array, ListArray, ListBuilder, StringArray, StringBuilder, TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Field, Float32Type, TimeUnit, TimestampMicrosecondType};

use super::segments::Segments;
use super::{COMPACT_ABOVE, folder_of};
use crate::columns::{HISTORY_DIGEST, ITEMS, LLM_ASKED_AT, PROMPT_DIGEST, SCORES, SETTINGS, USER_ID};
use crate::error::Result;
use crate::tables::{Store, Table};

/// Folder of the orders beside the ledger's.
pub const ORDERS: &str = "ledger_orders";

/// An order that the LLM gave.
#[derive(Clone, Debug, PartialEq)]
pub struct GivenOrder {
    /// The user, as text.
    pub user: String,
    /// Digest of what was known of the user and how it is told.
    pub history_digest: String,
    /// Digest of how the LLM was asked: engine, weights, mode and settings.
    pub settings: String,
    /// The shortlist's items as text, the LLM's order, best first.
    pub items: Vec<String>,
    /// Their scores.
    pub scores: Vec<f32>,
    /// The prompt that was answered; of several permutations, the first.
    pub prompt_digest: String,
    /// Microseconds since 1970, UTC.
    pub asked_at: i64,
}

impl GivenOrder {
    fn key(&self) -> (String, String, String) {
        (self.user.clone(), self.history_digest.clone(), self.settings.clone())
    }
}

/// The newest order of each (user, history, settings).
#[derive(Debug)]
pub struct Orders {
    segments: Segments,
    known: HashMap<(String, String, String), GivenOrder>,
    small: Vec<String>,
}

impl Orders {
    /// Opens the orders of the weights `weights` below `store`. Segments that cannot be read are left out: their users
    /// are asked again.
    ///
    /// # Errors
    /// Exit 75 where the store fails.
    pub async fn open(store: &Store, weights: &str) -> Result<Self> {
        // However large: merging drops the orders that a newer one replaced.
        let segments = Segments::new(store.child(&format!("{ORDERS}/{}", folder_of(weights))), u64::MAX);
        let found = segments.read().await?;
        let mut orders = Orders { segments, known: HashMap::new(), small: found.small };
        for (table, _) in &found.tables {
            for order in from_table(table).unwrap_or_default() {
                orders.keep(order);
            }
        }
        Ok(orders)
    }

    /// Keeps the newer of two; of two of the same time, the one of the smaller prompt digest.
    fn keep(&mut self, order: GivenOrder) {
        let newer = self.known.get(&order.key()).is_none_or(|old| {
            (order.asked_at, std::cmp::Reverse(&order.prompt_digest))
                > (old.asked_at, std::cmp::Reverse(&old.prompt_digest))
        });
        if newer {
            self.known.insert(order.key(), order);
        }
    }

    /// The newest order of a user.
    pub fn get(&self, user: &str, history_digest: &str, settings: &str) -> Option<&GivenOrder> {
        self.known.get(&(user.to_owned(), history_digest.to_owned(), settings.to_owned()))
    }

    /// Adds orders as one segment, and merges the small ones when there are many. Merged, only the newest order of each
    /// key is left.
    ///
    /// # Errors
    /// Exit 75 where the store fails.
    pub async fn append(&mut self, orders: Vec<GivenOrder>) -> Result<()> {
        // Also where another run appended the same ones: the segment has the same name then.
        let fresh: Vec<GivenOrder> = orders.into_iter().filter(|o| self.known.get(&o.key()) != Some(o)).collect();
        if fresh.is_empty() {
            return Ok(());
        }
        let file = self.segments.append(fresh.iter().map(|o| o.prompt_digest.as_str()), &to_table(&fresh)?).await?;
        self.small.push(file);
        fresh.into_iter().for_each(|o| self.keep(o));
        if self.small.len() > COMPACT_ABOVE {
            let mut all: Vec<&GivenOrder> = self.known.values().collect();
            all.sort_by(|a, b| (a.asked_at, &a.user, &a.prompt_digest).cmp(&(b.asked_at, &b.user, &b.prompt_digest)));
            let all: Vec<GivenOrder> = all.into_iter().cloned().collect();
            let (table, keys) = (to_table(&all)?, all.iter().map(|o| o.prompt_digest.as_str()));
            self.small = vec![self.segments.replace(&self.small, keys, &table).await?];
        }
        Ok(())
    }
}

/// Today's shortlist in an earlier order.
#[derive(Clone, Debug, PartialEq)]
pub struct CarriedOver {
    /// Share of today's shortlist that the LLM has ordered, in [0, 1].
    pub overlap: f64,
    /// Places of today's shortlist (0-based, in the recommender's order), best first.
    pub order: Vec<usize>,
}

/// Keeps the earlier order of the items that are still on the shortlist; an item that is new stands at the place that the
/// recommender gives it, and the kept ones fill the places between.
///
/// `earlier` is the LLM's order, `today` the recommender's, both without repeats.
pub fn carry_over<T: Eq + std::hash::Hash>(earlier: &[T], today: &[T]) -> CarriedOver {
    let place: HashMap<&T, usize> = today.iter().enumerate().map(|(p, item)| (item, p)).collect();
    let mut kept = earlier.iter().filter_map(|item| place.get(item).copied());
    let known: std::collections::HashSet<&T> = earlier.iter().collect();
    let shared = today.iter().filter(|item| known.contains(item)).count();
    let order = today
        .iter()
        .enumerate()
        .filter_map(|(p, item)| if known.contains(item) { kept.next() } else { Some(p) })
        .collect();
    let overlap = if today.is_empty() { 0.0 } else { shared as f64 / today.len() as f64 };
    CarriedOver { overlap, order }
}

fn to_table(orders: &[GivenOrder]) -> Result<Table> {
    let text =
        |of: fn(&GivenOrder) -> &String| -> ArrayRef { Arc::new(StringArray::from_iter_values(orders.iter().map(of))) };
    let mut items = ListBuilder::new(StringBuilder::new());
    orders.iter().for_each(|o| items.append_value(o.items.iter().map(Some)));
    let scores = orders.iter().map(|o| Some(o.scores.iter().map(|s| Some(*s))));
    let asked = TimestampMicrosecondArray::from_iter_values(orders.iter().map(|o| o.asked_at)).with_timezone("UTC");
    Table::from_columns(vec![
        (USER_ID, text(|o| &o.user), false),
        (HISTORY_DIGEST, text(|o| &o.history_digest), false),
        (SETTINGS, text(|o| &o.settings), false),
        (ITEMS, Arc::new(items.finish()), false),
        (SCORES, Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>(scores)), false),
        (PROMPT_DIGEST, text(|o| &o.prompt_digest), false),
        (LLM_ASKED_AT, Arc::new(asked), false),
    ])
}

fn from_table(table: &Table) -> Result<Vec<GivenOrder>> {
    let list = |of: DataType| DataType::List(Arc::new(Field::new_list_field(of, true)));
    let text = |name: &str| -> Result<Vec<String>> {
        Ok(table.strings(name)?.into_iter().map(Option::unwrap_or_default).collect())
    };
    let items = table.column_as(ITEMS, &list(DataType::Utf8))?;
    let scores = table.column_as(SCORES, &list(DataType::Float32))?;
    let asked = table.column_as(LLM_ASKED_AT, &DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())))?;
    let asked = asked.as_primitive::<TimestampMicrosecondType>();
    let (users, histories, settings) = (text(USER_ID)?, text(HISTORY_DIGEST)?, text(SETTINGS)?);
    let prompts = text(PROMPT_DIGEST)?;
    let rows = users.into_iter().zip(histories).zip(settings).zip(prompts).enumerate();
    Ok(rows
        .map(|(row, (((user, history_digest), settings), prompt_digest))| {
            let words = items.as_list::<i32>().value(row);
            let numbers = scores.as_list::<i32>().value(row);
            let numbers: &Float32Array = numbers.as_primitive::<Float32Type>();
            GivenOrder {
                user,
                history_digest,
                settings,
                items: words.as_string::<i32>().iter().map(|s| s.unwrap_or_default().to_owned()).collect(),
                scores: numbers.values().to_vec(),
                prompt_digest,
                asked_at: asked.value(row),
            }
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn order(user: &str, asked_at: i64) -> GivenOrder {
        GivenOrder {
            user: user.into(),
            history_digest: "h".into(),
            settings: "s".into(),
            items: vec!["b".into(), "a".into()],
            scores: vec![-0.5, -1.5],
            prompt_digest: format!("{user}{asked_at}"),
            asked_at,
        }
    }

    #[test]
    fn new_items_stand_where_the_recommender_has_them() {
        // The LLM had a > b > c > d; today the recommender has d > x > a > b.
        let carried = carry_over(&["a", "b", "c", "d"], &["d", "x", "a", "b"]);
        // x keeps the second place; a, b, d fill the others in the LLM's order.
        assert_eq!(carried.order, [2, 1, 3, 0]);
        assert_eq!(carried.overlap, 0.75);
        assert_eq!(carry_over(&["a"], &["a"]), CarriedOver { overlap: 1.0, order: vec![0] });
        assert_eq!(carry_over(&["a"], &["b", "c"]), CarriedOver { overlap: 0.0, order: vec![0, 1] });
        assert_eq!(carry_over::<&str>(&[], &[]), CarriedOver { overlap: 0.0, order: vec![] });
    }

    proptest! {
        #[test]
        fn nobody_is_lost_and_nobody_comes_twice(
            earlier in proptest::collection::hash_set(0u8..30, 0..20),
            today in proptest::collection::hash_set(0u8..30, 0..20),
        ) {
            let (earlier, today): (Vec<u8>, Vec<u8>) = (earlier.into_iter().collect(), today.into_iter().collect());
            let carried = carry_over(&earlier, &today);
            let mut all = carried.order.clone();
            all.sort_unstable();
            prop_assert_eq!(all, (0..today.len()).collect::<Vec<_>>());
            // Kept items are in the earlier order, new ones at their own place.
            let places: Vec<usize> = carried.order.iter().filter_map(|p| earlier.iter().position(|e| *e == today[*p])).collect();
            prop_assert!(places.windows(2).all(|w| w[0] < w[1]));
            for (rank, place) in carried.order.iter().enumerate() {
                prop_assert!(earlier.contains(&today[*place]) || rank == *place);
            }
        }
    }

    #[tokio::test]
    async fn the_newest_order_counts_and_survives_merging() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::local(folder.path()).unwrap();
        let mut orders = Orders::open(&store, "w").await.unwrap();
        for day in 0..=(COMPACT_ABOVE as i64) {
            orders.append(vec![order("u", day), order(&format!("v{day}"), day)]).await.unwrap();
        }
        assert_eq!(store.list(ORDERS).await.unwrap().len(), 1, "they were merged");
        let again = Orders::open(&store, "w").await.unwrap();
        assert_eq!(again.get("u", "h", "s"), Some(&order("u", COMPACT_ABOVE as i64)));
        assert_eq!(again.known.len(), COMPACT_ABOVE + 2);
        assert_eq!(
            (again.get("u", "other", "s"), again.get("u", "h", "other"), again.get("x", "h", "s")),
            (None, None, None)
        );
        // Merging leaves one row of a key.
        let rows: usize = again.segments.read().await.unwrap().tables.iter().map(|(t, _)| t.num_rows()).sum();
        assert_eq!(rows, COMPACT_ABOVE + 2);
    }
}
