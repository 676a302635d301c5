//! `popular`: what is popular, for users of whom no interaction is known.
//!
//! In: interactions, and a table of all users, perhaps with facts about them. Out: `shortlist` for the users without
//! interactions: the most popular items among users who are like them in the facts that are known, then those
//! among all.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use arrow::array::{Float32Array, Int32Array, StringArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use async_trait::async_trait;
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::context::{InputSlot, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What};
use super::registry::StageKind;
use super::train::outputs::id_type;
use crate::columns::{ITEM_ID, REC_RANK, REC_SCORE, USER_ID};
use crate::error::{Error, Result};
use crate::interactions::IdMap;
use crate::tables::Table;

/// Config of a `popular` stage.
///
/// Popularity of an item is the number of different users with an interaction with it, here written to `rec_score`; equal ones are
/// in the order of the item ids. Only users without any row in `history` get a list.
///
/// Counters: `users` (with a list), `users_by_group` (of them those whose facts decided), `rows`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PopularConfig {
    /// What is known: `user_id`, `item_id`.
    pub history: String,
    /// All users who are to get a list: `user_id`, and the columns of `by`. Those who occur in `history` are left to the recommender.
    pub users: String,
    /// Facts about users, columns of `users`, the most telling first: `["country", "age_group"]`. Counted are users with the
    /// same values in all of them; where these are fewer than `min_users`, or a value is null, in all but the last, and so on
    /// down to everyone.
    #[serde(default)]
    pub by: Vec<String>,
    /// Users with interactions that a group has at least. Default 20.
    #[serde(default = "default_min_users")]
    #[schemars(range(min = 1))]
    pub min_users: usize,
    /// Length of a list, as of the recommender's shortlist. Default 20.
    #[serde(default = "default_k")]
    #[schemars(range(min = 1, max = 10_000))]
    pub k: usize,
}

fn default_min_users() -> usize {
    20
}
fn default_k() -> usize {
    20
}

/// The stage kind.
pub(super) const KIND: StageKind = StageKind {
    name: "popular",
    version: 1,
    about: "What is popular among those who are alike, for users without any known interaction.",
    sample: "history = \"parts.history\"\nusers = \"users\"\nby = [\"country\"]\n",
    schema: || schema_for!(PopularConfig),
    resolve,
};

const SHORTLIST: &str = "shortlist";

fn resolve(config: Value, _: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: PopularConfig =
        serde_json::from_value(config).map_err(|e| Error::spec("the config of a `popular` stage").because(e))?;
    for (key, value) in [("k", config.k), ("min_users", config.min_users)] {
        if value == 0 {
            return Err(Error::spec(format!("`{key}` is 0")).with_help("1 is the least"));
        }
    }
    Ok(Box::new(Popular { config }))
}

struct Popular {
    config: PopularConfig,
}

fn schema(user: DataType, item: DataType) -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new(USER_ID, user, false),
        Field::new(ITEM_ID, item, false),
        Field::new(REC_RANK, DataType::Int32, false),
        Field::new(REC_SCORE, DataType::Float32, false),
        Field::new("within", DataType::Utf8, true),
    ]))
}

#[async_trait]
impl Stage for Popular {
    fn inputs(&self) -> Vec<InputSlot> {
        vec![
            InputSlot::table("history", &self.config.history, &[USER_ID, ITEM_ID]),
            InputSlot::table("users", &self.config.users, &[USER_ID]),
        ]
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        vec![OutputSlot {
            name: SHORTLIST,
            what: What::Table,
            about: "`user_id`, `item_id`, `rec_rank`, `rec_score`, `within` (the facts that decided; null for everyone), for `popular` of a `fuse` stage.",
        }]
    }

    fn identity(&self) -> Value {
        json!({ "by": self.config.by, "min_users": self.config.min_users, "k": self.config.k })
    }

    async fn plan_schemas(&self, inputs: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        if let Some(users) = inputs.get("users") {
            check_facts(&self.config.by, users)?;
        }
        let id = |name: &str| inputs.get("history").and_then(|h| h.field_with_name(name).ok());
        let types = id(USER_ID).zip(id(ITEM_ID)).map(|(u, i)| schema(id_type(u.data_type()), id_type(i.data_type())));
        Ok(types.map(|s| (SHORTLIST.to_owned(), s)).into_iter().collect())
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        let (history, users) = (ctx.collect("history").await?, ctx.collect("users").await?);
        let config = self.config.clone();
        ctx.cancel.check()?;
        tokio::task::spawn_blocking(move || popular(&config, &history, &users)).await?
    }
}

fn check_facts(by: &[String], users: &Schema) -> Result<()> {
    match by.iter().find(|c| users.index_of(c).is_err()) {
        None => Ok(()),
        Some(missing) => Err(Error::data(format!("input `users` lacks the column `{missing}` that `by` names"))
            .with_help("name columns of the users' table, or leave `by` out")),
    }
}

/// The first n of `by` with their values.
type Group = Vec<String>;

/// Distinct users per item, most popular first.
fn ranked(counts: HashMap<u32, u32>) -> Vec<(u32, u32)> {
    let mut all: Vec<(u32, u32)> = counts.into_iter().collect();
    all.sort_unstable_by_key(|&(item, n)| (std::cmp::Reverse(n), item));
    all
}

fn popular(config: &PopularConfig, history: &Table, users: &Table) -> Result<StageResult> {
    check_facts(&config.by, &users.schema())?;
    let place = |table: &Table, slot: &str, name: &str| table.ids(name).map_err(|e| e.at(format!("input `{slot}`")));
    let (seen_users, seen_items) = (place(history, "history", USER_ID)?, place(history, "history", ITEM_ID)?);
    let listed = place(users, "users", USER_ID)?;
    if listed.data_type() != seen_users.data_type() && !listed.is_empty() && !seen_users.is_empty() {
        return Err(Error::data(format!(
            "column `{USER_ID}` is {} in `users` and {} in `history`",
            listed.data_type(),
            seen_users.data_type()
        ))
        .with_help("cast one of them in a `sql` stage"));
    }
    let (known, items) = (IdMap::new(&[&seen_users])?, IdMap::new(&[&seen_items])?);
    let everyone = IdMap::new(&[&listed])?;

    // The facts of each user, up to the first that is not known; of several rows of a user the first counts.
    let columns = config.by.iter().map(|c| users.strings(c)).collect::<Result<Vec<_>>>()?;
    let mut facts: Vec<Option<Group>> = vec![None; everyone.len()];
    for (row, user) in everyone.encode(&listed).into_iter().enumerate() {
        if let Some(user) = user {
            facts[user as usize].get_or_insert_with(|| columns.iter().map_while(|c| c[row].clone()).collect());
        }
    }
    let facts_of = |known_user: u32| -> &[String] {
        let user = everyone.get(&known.ids().get(known_user as usize));
        user.and_then(|u| facts[u as usize].as_deref()).unwrap_or_default()
    };

    let pairs: BTreeSet<(u32, u32)> = known
        .encode(&seen_users)
        .into_iter()
        .zip(items.encode(&seen_items))
        .filter_map(|(user, item)| user.zip(item))
        .collect();
    let mut counts: HashMap<Group, HashMap<u32, u32>> = HashMap::new();
    let mut sizes: HashMap<Group, BTreeSet<u32>> = HashMap::new();
    for &(user, item) in &pairs {
        let facts = facts_of(user);
        for depth in 0..=facts.len() {
            let group = facts[..depth].to_vec();
            *counts.entry(group.clone()).or_default().entry(item).or_default() += 1;
            sizes.entry(group).or_default().insert(user);
        }
    }
    let ranked: HashMap<Group, Vec<(u32, u32)>> =
        counts.into_iter().map(|(group, counts)| (group, ranked(counts))).collect();
    let nothing = Vec::new();
    let overall = ranked.get(&Vec::new()).unwrap_or(&nothing);

    let (mut of_user, mut of_item, mut ranks, mut scores, mut within) = (vec![], vec![], vec![], vec![], vec![]);
    let (mut n_users, mut by_group) = (0usize, 0usize);
    for (user, facts) in facts.iter().enumerate() {
        if known.get(&everyone.ids().get(user)).is_some() {
            continue;
        }
        let facts = facts.as_deref().unwrap_or_default();
        let enough = |depth: &usize| sizes.get(&facts[..*depth]).is_some_and(|s| s.len() >= config.min_users);
        let depth = (1..=facts.len()).rev().find(enough).unwrap_or(0);
        let first = ranked.get(&facts[..depth]).unwrap_or(&nothing);
        let mut taken = BTreeSet::new();
        let list = first.iter().chain(overall).filter(|(item, _)| taken.insert(*item)).take(config.k);
        let told: Vec<String> = config.by[..depth].iter().zip(facts).map(|(c, v)| format!("{c}={v}")).collect();
        let told = (depth > 0).then(|| told.join(", "));
        let before = of_user.len();
        for (place, &(item, n)) in list.enumerate() {
            of_user.push(user);
            of_item.push(item as usize);
            ranks.push(place as i32 + 1);
            scores.push(n as f32);
            within.push(told.clone());
        }
        if of_user.len() > before {
            n_users += 1;
            by_group += usize::from(depth > 0);
        }
    }
    let rows = of_user.len();
    let table = Table::from_columns(vec![
        (USER_ID, everyone.ids().take(of_user.into_iter()).to_array(), false),
        (ITEM_ID, items.ids().take(of_item.into_iter()).to_array(), false),
        (REC_RANK, Arc::new(Int32Array::from(ranks)), false),
        (REC_SCORE, Arc::new(Float32Array::from(scores)), false),
        ("within", Arc::new(StringArray::from(within)), true),
    ])?;
    Ok(StageResult::default()
        .with_counter("users", n_users)
        .with_counter("users_by_group", by_group)
        .with_counter("rows", rows)
        .with_table(SHORTLIST, table))
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, Int64Array};

    use super::*;
    use crate::stages::OutputTable;

    fn ints(values: &[i64]) -> ArrayRef {
        Arc::new(Int64Array::from(values.to_vec()))
    }

    fn rows(
        config: Value,
        history: &[(i64, i64)],
        users: &[(i64, Option<&str>)],
    ) -> Vec<(i64, i64, i32, Option<String>)> {
        let config: PopularConfig = serde_json::from_value(config).unwrap();
        let (u, i): (Vec<i64>, Vec<i64>) = history.iter().copied().unzip();
        let history = Table::from_columns(vec![(USER_ID, ints(&u), false), (ITEM_ID, ints(&i), false)]).unwrap();
        let facts: StringArray = users.iter().map(|u| u.1).collect();
        let ids = ints(&users.iter().map(|u| u.0).collect::<Vec<_>>());
        let users =
            Table::from_columns(vec![(USER_ID, ids, false), ("country", Arc::new(facts) as ArrayRef, true)]).unwrap();
        let mut result = popular(&config, &history, &users).unwrap();
        let Some(OutputTable::Memory(table)) = result.tables.remove(SHORTLIST) else { panic!("no table") };
        let (u, i) = (table.i64s(USER_ID).unwrap(), table.i64s(ITEM_ID).unwrap());
        let (r, w) = (table.i32s(REC_RANK).unwrap(), table.strings("within").unwrap());
        (0..u.len()).map(|n| (u[n], i[n], r[n], w[n].clone())).collect()
    }

    #[test]
    fn new_users_get_what_those_alike_like_and_then_what_all_do() {
        // Users 1 and 2 of France like 10, 3 to 5 of Peru 20; 30 is known to one of each.
        let history = [(1, 10), (2, 10), (2, 10), (2, 30), (3, 20), (4, 20), (5, 20), (5, 30)];
        let users = [
            (1, Some("fr")),
            (2, Some("fr")),
            (3, Some("pe")),
            (4, Some("pe")),
            (5, Some("pe")),
            (6, Some("fr")),
            (7, None),
            (8, Some("de")),
        ];
        let config = |least: usize, k: usize| json!({"history": "h", "users": "u", "by": ["country"], "min_users": least, "k": k});
        let fr = Some("country=fr".to_owned());
        let want = vec![
            (6, 10, 1, fr.clone()),
            (6, 30, 2, fr.clone()),
            (6, 20, 3, fr),
            (7, 20, 1, None),
            (7, 10, 2, None),
            (7, 30, 3, None),
            (8, 20, 1, None),
            (8, 10, 2, None),
            (8, 30, 3, None),
        ];
        assert_eq!(rows(config(2, 5), &history, &users), want);
        // With groups of three at least those of France are too few.
        assert_eq!(rows(config(3, 1), &history, &users)[0], (6, 20, 1, None));
    }

    #[test]
    fn nobody_new_gives_an_empty_table() {
        assert!(rows(json!({"history": "h", "users": "u"}), &[(1, 10)], &[(1, None)]).is_empty());
    }
}
