//! The fused table: shortlists, the LLM's order of them and the weights in, one row per user
//! and rank out, with all that explains the rank.
//!
//! In: the tables that the `fuse` stage is given. Out: [`FusedTables`], the first k of each
//! user and the whole shortlist, as declared in [`crate::tables::schemas`].

use std::sync::Arc;

use arrow::array::{
    ArrayRef, BooleanArray, Float32Array, Float64Array, Int32Array, Int64Array, StringArray, UInt64Array,
    new_null_array,
};
use arrow::compute::{filter_record_batch, take};
use arrow::datatypes::{DataType, TimeUnit};

use crate::columns::{
    ITEM_ID, LLM_ASKED_AT, LLM_RANK, LLM_SCORE, PROMPT_DIGEST, RANK, REASON, REC_RANK, REC_SCORE, SOURCE, TITLE,
    USER_ID,
};
use crate::error::{Error, Result};
use crate::fusion::long_tail::{Bounds, History, LongTail, Weights};
use crate::fusion::shortlists::{Shortlists, encode};
use crate::fusion::source::{self, Source};
use crate::interactions::IdMap;
use crate::tables::schemas::{SHORTLIST, TableSpec};
use crate::tables::{IdColumn, Table};

/// The tables that fusion reads.
#[derive(Clone, Copy)]
pub struct FuseInputs<'a> {
    /// [`FuseInputs::SHORTLIST`].
    pub shortlist: &'a Table,
    /// [`FuseInputs::SHORTLIST`] for users without any known interaction; those of users who are in `shortlist` are left
    /// out.
    pub popular: Option<&'a Table>,
    /// [`FuseInputs::RERANK`], and `source` where it has it; `None` without an LLM.
    pub rerank: Option<&'a Table>,
    /// Users that the LLM was not asked for or failed for: [`FuseInputs::NOT_ASKED`], and
    /// `source` where it has it.
    pub not_asked: Option<&'a Table>,
    /// [`LongTail::COLUMNS`].
    pub long_tail: &'a Table,
    /// Titles: [`FuseInputs::ITEMS`].
    pub items: Option<&'a Table>,
}

impl FuseInputs<'_> {
    /// Columns of the shortlists.
    pub const SHORTLIST: [&'static str; 4] = [USER_ID, ITEM_ID, REC_RANK, REC_SCORE];
    /// Columns of the LLM's ranks.
    pub const RERANK: [&'static str; 6] = [USER_ID, ITEM_ID, LLM_RANK, LLM_SCORE, PROMPT_DIGEST, LLM_ASKED_AT];
    /// Columns of the users that the LLM was not asked for.
    pub const NOT_ASKED: [&'static str; 2] = [USER_ID, REASON];
    /// Columns of the item table.
    pub const ITEMS: [&'static str; 2] = [ITEM_ID, TITLE];
}

/// How to fuse.
#[derive(Clone, Debug)]
pub struct FuseOptions {
    /// a1 and a2 of eq. 7.
    pub weights: Weights,
    /// C of the position utilities, > 0.
    pub c: f64,
    /// l_min and l_max of an earlier evaluation; those of the long-tail table when `None`.
    pub bounds: Option<Bounds>,
    /// How many items of each user are recommended, >= 1.
    pub k: usize,
    /// Id of the run.
    pub run_id: String,
    /// Digest of the recommender's weights.
    pub rec_model: Option<String>,
    /// Digest of the LLM's weights.
    pub llm_model: Option<String>,
}

/// What fusion makes.
#[derive(Clone, Debug)]
pub struct FusedTables {
    /// The first k items of each user, sorted by user and rank.
    pub recommendations: Table,
    /// All candidates of each user, sorted by user and rank.
    pub shortlist: Table,
    /// What happened on the way.
    pub counts: FuseCounts,
}

/// Figures of a fusion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FuseCounts {
    /// Users with a shortlist.
    pub users: usize,
    /// Those of them whose list the LLM had a say in.
    pub users_fused: usize,
    /// Those of them for whom the LLM failed.
    pub users_fallback: usize,
    /// Those of them who get what is popular.
    pub users_popularity: usize,
    /// Candidates without a title, where an item table is given.
    pub candidates_without_title: usize,
    /// LLM ranks of items that are not on the user's shortlist, left out.
    pub llm_rows_outside: usize,
    /// Users whose list has other items first than the recommender's.
    pub users_first_place_changed: usize,
    /// Users whose first k are other items, or in another order, than the recommender's.
    pub users_top_k_changed: usize,
}

/// Fuses (eq. 5 to 7). Errors (exit 65): what [`Shortlists::from_tables`] and
/// [`LongTail::from_table`] refuse, a user twice among those not asked, an unknown `source`.
pub fn fuse_tables(inputs: &FuseInputs<'_>, options: &FuseOptions) -> Result<FusedTables> {
    let with_popular;
    let inputs = match inputs.popular {
        None => inputs,
        Some(popular) => {
            with_popular = concatenated(inputs.shortlist, popular).map_err(|e| e.at("popular"))?;
            &FuseInputs { shortlist: &with_popular, popular: None, ..*inputs }
        }
    };
    let lists = Shortlists::from_tables(inputs.shortlist, inputs.rerank).map_err(|e| e.at("shortlists"))?;
    let long_tail = LongTail::from_table(inputs.long_tail).map_err(|e| e.at("long-tail table"))?;
    encode(lists.users(), long_tail.users().ids(), USER_ID)?;
    let not_asked = NotAsked::from_table(inputs.not_asked, lists.users()).map_err(|e| e.at("users not asked"))?;
    let titles = Titles::from_table(inputs.items, lists.items()).map_err(|e| e.at("item table"))?;
    let asked_sources = match inputs.rerank {
        Some(table) => llm_sources(table).map_err(|e| e.at("LLM ranks"))?,
        None => Vec::new(),
    };
    let bounds = options.bounds.unwrap_or(long_tail.bounds());

    let mut rows = Rows::with_capacity(lists.len());
    let mut counts =
        FuseCounts { llm_rows_outside: lists.llm_rows_outside(), users: lists.users().len(), ..Default::default() };
    for user in 0..lists.users().len() {
        let history = long_tail.of(&lists.users().ids().get(user));
        let entries = lists.of(user);
        let llm_row = entries.iter().find_map(|e| e.llm_row);
        let (from, reason) = match llm_row {
            Some(row) => (asked_sources[row], None),
            None => not_asked.why(user, &history, inputs.rerank.is_some()),
        };
        let alpha = if from.by_llm() { options.weights.alpha(history.coefficient, &bounds) } else { 0.0 };
        let order = lists.fuse(user, alpha, options.c);

        counts.users_fused += usize::from(from.by_llm());
        counts.users_fallback += usize::from(from == Source::Fallback);
        counts.users_popularity += usize::from(from == Source::Popularity);
        let moved = |depth: usize| order.iter().take(depth).enumerate().any(|(place, f)| f.index != place);
        counts.users_first_place_changed += usize::from(moved(1));
        counts.users_top_k_changed += usize::from(moved(options.k));

        for (place, fused) in order.iter().enumerate() {
            let entry = &entries[fused.index];
            let title = titles.row(entry.candidate.item);
            counts.candidates_without_title += usize::from(titles.given && title.is_none());
            // An item that the LLM was not shown is there by the recommender alone, even
            // where the LLM ranked the others: its utility is that of its place.
            let (source, reason, alpha) = match (from.by_llm(), entry.llm_row) {
                (true, Some(_)) => (from, None, alpha),
                (true, None) => {
                    let why = if titles.given && title.is_none() { source::NO_TITLE } else { source::NOT_SHOWN };
                    (Source::Recommender, Some(why), 0.0)
                }
                (false, _) => (from, reason, 0.0),
            };
            rows.user.push(user);
            rows.shortlist_row.push(entry.row as u64);
            rows.llm_row.push(entry.llm_row.map(|r| r as u64));
            rows.title_row.push(title);
            rows.rank.push(place as i32 + 1);
            rows.score.push(fused.utility);
            rows.rec_rank.push(entry.candidate.rec_place as i32);
            rows.llm_rank.push(entry.candidate.llm_place.map(|p| p as i32));
            rows.alpha.push(alpha);
            rows.history.push(history);
            rows.source.push(source);
            rows.reason.push(reason.map(str::to_owned));
        }
    }
    let whole = rows.into_table(&SHORTLIST, &lists, inputs, options)?;
    let recommendations = first_k(&whole, options.k)?;
    Ok(FusedTables { recommendations, shortlist: whole, counts })
}

/// The shortlists and behind them the lists of users that these lack.
fn concatenated(shortlist: &Table, popular: &Table) -> Result<Table> {
    let (users, others) = (shortlist.ids(USER_ID)?, popular.ids(USER_ID)?);
    let have = IdMap::new(&[&users])?;
    let new: Vec<u64> =
        (0..).zip(encode(&have, &others, USER_ID)?).filter(|(_, u)| u.is_none()).map(|(r, _)| r).collect();
    let new = UInt64Array::from(new);
    let joined = |name: &str| -> Result<ArrayRef> {
        let (a, b) = match name {
            USER_ID | ITEM_ID => (shortlist.ids(name)?.to_array(), popular.ids(name)?.to_array()),
            REC_RANK => (shortlist.column_as(name, &DataType::Int32)?, popular.column_as(name, &DataType::Int32)?),
            _ => (shortlist.column_as(name, &DataType::Float32)?, popular.column_as(name, &DataType::Float32)?),
        };
        let b = take(&b, &new, None)?;
        // An empty table's ids may be of another type.
        Ok(match (a.is_empty(), b.is_empty()) {
            (true, false) => b,
            (false, true) => a,
            _ if a.data_type() != b.data_type() => {
                return Err(Error::data(format!(
                    "column `{name}` is {} here and {} in the shortlists",
                    b.data_type(),
                    a.data_type()
                )));
            }
            _ => arrow::compute::concat(&[&a, &b])?,
        })
    };
    let columns = FuseInputs::SHORTLIST.into_iter().map(|name| Ok((name, joined(name)?, false)));
    Table::from_columns(columns.collect::<Result<Vec<_>>>()?)
}

/// The rows of rank <= k: the columns of `recommendations` are those of `shortlist`.
fn first_k(whole: &Table, k: usize) -> Result<Table> {
    let batch = whole.to_batch()?;
    let keep: BooleanArray = whole.i32s(RANK)?.into_iter().map(|rank| Some(rank as usize <= k)).collect();
    Ok(Table::from_batch(filter_record_batch(&batch, &keep)?))
}

/// The fused rows as columns; equal lengths.
struct Rows {
    user: Vec<usize>,
    shortlist_row: Vec<u64>,
    llm_row: Vec<Option<u64>>,
    title_row: Vec<Option<u64>>,
    rank: Vec<i32>,
    score: Vec<f64>,
    rec_rank: Vec<i32>,
    llm_rank: Vec<Option<i32>>,
    alpha: Vec<f64>,
    history: Vec<History>,
    source: Vec<Source>,
    reason: Vec<Option<String>>,
}

impl Rows {
    fn with_capacity(n: usize) -> Rows {
        Rows {
            user: Vec::with_capacity(n),
            shortlist_row: Vec::with_capacity(n),
            llm_row: Vec::with_capacity(n),
            title_row: Vec::with_capacity(n),
            rank: Vec::with_capacity(n),
            score: Vec::with_capacity(n),
            rec_rank: Vec::with_capacity(n),
            llm_rank: Vec::with_capacity(n),
            alpha: Vec::with_capacity(n),
            history: Vec::with_capacity(n),
            source: Vec::with_capacity(n),
            reason: Vec::with_capacity(n),
        }
    }

    fn into_table(
        self,
        spec: &TableSpec,
        lists: &Shortlists,
        inputs: &FuseInputs<'_>,
        options: &FuseOptions,
    ) -> Result<Table> {
        let n = self.rank.len();
        let users = lists.users().ids();
        let items = inputs.shortlist.ids(ITEM_ID)?;
        let rec_row = UInt64Array::from(self.shortlist_row);
        let llm_row = UInt64Array::from(self.llm_row);
        let of_llm = |name: &str, to: &DataType| taken(inputs.rerank, name, to, &llm_row);
        let instant = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
        let of_rec = |s: &Source| if *s == Source::Popularity { None } else { options.rec_model.as_deref() };
        let by_rec = self.source.iter().map(of_rec);
        let by_llm = self.source.iter().map(|s| if s.by_llm() { options.llm_model.as_deref() } else { None });
        let arrays: Vec<ArrayRef> = vec![
            users.take(self.user.iter().copied()).to_array(),
            take(&items.to_array(), &rec_row, None)?,
            taken(inputs.items, TITLE, &DataType::Utf8, &UInt64Array::from(self.title_row))?,
            Arc::new(Int32Array::from(self.rank)),
            Arc::new(Float64Array::from(self.score)),
            Arc::new(Int32Array::from(self.rec_rank)),
            Arc::new(take(&Float32Array::from(inputs.shortlist.f32s(REC_SCORE)?), &rec_row, None)?),
            Arc::new(Int32Array::from(self.llm_rank)),
            of_llm(LLM_SCORE, &DataType::Float32)?,
            Arc::new(Float64Array::from(self.alpha)),
            Arc::new(Float64Array::from_iter_values(self.history.iter().map(|h| h.coefficient))),
            Arc::new(Int64Array::from_iter_values(self.history.iter().map(|h| h.interactions))),
            Arc::new(StringArray::from_iter_values(self.history.iter().map(|h| h.bucket.as_str()))),
            Arc::new(StringArray::from_iter_values(self.source.iter().map(|s| s.as_str()))),
            Arc::new(StringArray::from(self.reason)),
            of_llm(PROMPT_DIGEST, &DataType::Utf8)?,
            of_llm(LLM_ASKED_AT, &instant)?,
            Arc::new(StringArray::from_iter_values(std::iter::repeat_n(options.run_id.as_str(), n))),
            Arc::new(by_rec.collect::<StringArray>()),
            Arc::new(by_llm.collect::<StringArray>()),
        ];
        spec.table(&users.data_type(), &items.data_type(), arrays)
    }
}

/// The given rows of a column; nulls where a row is null or there is no table.
fn taken(table: Option<&Table>, name: &str, to: &DataType, rows: &UInt64Array) -> Result<ArrayRef> {
    match table {
        Some(table) => Ok(take(&table.column_as(name, to)?, rows, None)?),
        None => Ok(new_null_array(to, rows.len())),
    }
}

/// The source of each LLM rank: its `source` column, or `fused` where there is none.
fn llm_sources(table: &Table) -> Result<Vec<Source>> {
    if !table.has(SOURCE) {
        return Ok(vec![Source::Fused; table.num_rows()]);
    }
    let parse = |name: Option<String>| match name {
        None => Ok(Source::Fused),
        Some(name) => match Source::parse(&name)? {
            source if source.by_llm() => Ok(source),
            other => Err(Error::data(format!("column `{SOURCE}` holds `{}` beside an LLM rank", other.as_str()))
                .with_help("a row that the LLM ranked is `fused` or `reused`")),
        },
    };
    table.strings(SOURCE)?.into_iter().map(parse).collect()
}

/// Why the LLM has no say in a user's list.
struct NotAsked {
    of: Vec<Option<(Source, Option<String>)>>,
}

impl NotAsked {
    fn from_table(table: Option<&Table>, users: &IdMap) -> Result<NotAsked> {
        let mut of = vec![None; users.len()];
        let Some(table) = table else { return Ok(NotAsked { of }) };
        let ids: IdColumn = table.ids(USER_ID)?;
        let reasons = table.strings(REASON)?;
        let sources = match table.has(SOURCE) {
            true => table.strings(SOURCE)?,
            false => vec![None; ids.len()],
        };
        let rows = encode(users, &ids, USER_ID)?.into_iter().zip(sources).zip(reasons).enumerate();
        for (row, ((user, source), reason)) in rows {
            let source = match source {
                None => Source::Recommender,
                Some(name) => match Source::parse(&name)? {
                    s if s.by_llm() => {
                        return Err(Error::data(format!(
                            "user `{}` was not asked for, and its source is `{name}`",
                            ids.get(row)
                        ))
                        .with_help("the source of such a user is `recommender`, `fallback` or `popularity`"));
                    }
                    s => s,
                },
            };
            // Users without a shortlist have no row that could say why.
            let Some(user) = user else { continue };
            if of[user as usize].replace((source, reason)).is_some() {
                return Err(Error::data(format!("user `{}` has two rows", ids.get(row)))
                    .with_help("the table of users not asked has one row per user"));
            }
        }
        Ok(NotAsked { of })
    }

    /// Source and reason of a user for whom the LLM gave no rank.
    fn why(&self, user: usize, history: &History, llm_in_use: bool) -> (Source, Option<&str>) {
        match &self.of[user] {
            Some((source, reason)) => (*source, Some(reason.as_deref().unwrap_or(source::NOT_ASKED))),
            None if history.interactions == 0 => (Source::Popularity, Some(source::COLD_USER)),
            None if llm_in_use => (Source::Recommender, Some(source::NOT_ASKED)),
            None => (Source::Recommender, Some(source::NO_LLM)),
        }
    }
}

/// Which row of the item table titles an item.
struct Titles {
    given: bool,
    row_of: Vec<Option<u64>>,
}

impl Titles {
    /// The first row with a title that is not blank counts.
    fn from_table(table: Option<&Table>, items: &IdMap) -> Result<Titles> {
        let mut row_of = vec![None; items.len()];
        let Some(table) = table else { return Ok(Titles { given: false, row_of }) };
        let ids = encode(items, &table.ids(ITEM_ID)?, ITEM_ID)?;
        for (row, (item, title)) in ids.into_iter().zip(table.strings(TITLE)?).enumerate() {
            if let (Some(item), Some(title)) = (item, title)
                && !title.trim().is_empty()
            {
                row_of[item as usize].get_or_insert(row as u64);
            }
        }
        Ok(Titles { given: true, row_of })
    }

    fn row(&self, item: u32) -> Option<u64> {
        self.row_of[item as usize]
    }
}
