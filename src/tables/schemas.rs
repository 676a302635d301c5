//! The declared schemas of the tables that others read: what `docs/tables.md` says is
//! generated from here, and the stages build their outputs from here.
//!
//! In: the types of the ids (they stay as in the source). Out: Arrow schemas and the
//! reference page.

use std::fmt::Write;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};

use crate::columns;
use crate::error::{Error, Result};
use crate::tables::Table;

/// Type of a declared column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The user's id: int64 or string, as in the source.
    User,
    /// The item's id: int64 or string, as in the source.
    Item,
    /// UTF-8 text.
    Text,
    /// Truth value.
    Bool,
    /// 32-bit integer.
    Int32,
    /// 64-bit integer.
    Int64,
    /// 32-bit float.
    Float32,
    /// 64-bit float.
    Float64,
    /// Microseconds since 1970, UTC.
    Instant,
    /// Text that is in the folder's name (`ds=2026-11-22`), not in the file.
    Partition,
}

impl Kind {
    fn data_type(self, user: &DataType, item: &DataType) -> DataType {
        match self {
            Kind::User => user.clone(),
            Kind::Item => item.clone(),
            Kind::Text | Kind::Partition => DataType::Utf8,
            Kind::Bool => DataType::Boolean,
            Kind::Int32 => DataType::Int32,
            Kind::Int64 => DataType::Int64,
            Kind::Float32 => DataType::Float32,
            Kind::Float64 => DataType::Float64,
            Kind::Instant => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::User | Kind::Item => "int64 or string, as in the source",
            Kind::Text => "string",
            Kind::Bool => "boolean",
            Kind::Int32 => "int32",
            Kind::Int64 => "int64",
            Kind::Float32 => "float32",
            Kind::Float64 => "float64",
            Kind::Instant => "timestamp (microseconds, UTC)",
            Kind::Partition => "string, partition column",
        }
    }
}

/// One declared column.
#[derive(Clone, Copy, Debug)]
pub struct ColumnSpec {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// Whether it may be null.
    pub nullable: bool,
    /// What it means.
    pub about: &'static str,
}

const fn column(name: &'static str, kind: Kind, about: &'static str) -> ColumnSpec {
    ColumnSpec { name, kind, nullable: false, about }
}

const fn nullable(name: &'static str, kind: Kind, about: &'static str) -> ColumnSpec {
    ColumnSpec { name, kind, nullable: true, about }
}

/// One declared table.
#[derive(Clone, Copy, Debug)]
pub struct TableSpec {
    /// Its name.
    pub name: &'static str,
    /// What it is for, in Markdown.
    pub about: &'static str,
    /// What one row is, and the order of the rows.
    pub rows: &'static str,
    /// Its columns in order.
    pub columns: &'static [ColumnSpec],
}

impl TableSpec {
    /// The Arrow schema of its files; partition columns are not in files.
    pub fn schema(&self, user: &DataType, item: &DataType) -> SchemaRef {
        let fields: Vec<Field> =
            self.in_file().map(|c| Field::new(c.name, c.kind.data_type(user, item), c.nullable)).collect();
        Arc::new(Schema::new(fields))
    }

    /// The schema of a table that has no ids in it.
    pub fn plain_schema(&self) -> SchemaRef {
        self.schema(&DataType::Utf8, &DataType::Utf8)
    }

    /// A table of this schema from its columns, in order.
    /// An error is our bug: a column is missing, or has a null or type that is not declared.
    pub fn table(&self, user: &DataType, item: &DataType, arrays: Vec<ArrayRef>) -> Result<Table> {
        let batch = RecordBatch::try_new(self.schema(user, item), arrays)
            .map_err(|e| Error::internal(format!("table `{}` does not fit its declaration", self.name)).because(e))?;
        Ok(Table::from_batch(batch))
    }

    fn in_file(&self) -> impl Iterator<Item = &'static ColumnSpec> {
        self.columns.iter().filter(|c| c.kind != Kind::Partition)
    }
}

const DS: ColumnSpec = column(columns::DS, Kind::Partition, "Day of the run, from the folder's name: `ds=2026-11-22`.");
const RUN_ID: ColumnSpec = column(columns::RUN_ID, Kind::Text, "The run that made the row.");
const USER: ColumnSpec = column(columns::USER_ID, Kind::User, "The user.");
const ITEM: ColumnSpec = column(columns::ITEM_ID, Kind::Item, "The item.");
const ALPHA: ColumnSpec = column(
    columns::ALPHA,
    Kind::Float64,
    "Weight of the LLM in `score`, in [0, 1] (eq. 7); 0 where it was not asked or failed, and for an item that it was not shown.",
);
const LONG_TAIL: ColumnSpec =
    column(columns::LONG_TAIL_COEFFICIENT, Kind::Float64, "l_u = ln(`interactions` + 1) (eq. 5).");
const INTERACTIONS: ColumnSpec = column(
    columns::INTERACTIONS,
    Kind::Int64,
    "N(u), the user's known interactions; `history_at_test` says which those are.",
);
const BUCKET: ColumnSpec = column(
    columns::BUCKET,
    Kind::Text,
    "`tail`, `torso` or `head`: the user's third by `interactions`, few to many, ties by user id.",
);
const SOURCE: ColumnSpec = column(
    columns::SOURCE,
    Kind::Text,
    "`fused`, `reused` (an earlier order of the LLM), `recommender` (LLM not asked), `fallback` (LLM failed), `popularity` (nothing known of the user).",
);
const REASON: ColumnSpec = nullable(
    columns::REASON,
    Kind::Text,
    "Why `source` is not `fused`: `budget`, `no_title`, `not_shown`, `cold_user`, `not_asked`, `no_llm`, or what the `rerank` stage gave.",
);
const DIGEST: ColumnSpec =
    nullable(columns::PROMPT_DIGEST, Kind::Text, "sha256 (hex) of the prompt, the key of the LLM's ledger.");
const ASKED_AT: ColumnSpec = nullable(columns::LLM_ASKED_AT, Kind::Instant, "When the LLM answered.");
const REC_MODEL: ColumnSpec = nullable(
    columns::REC_MODEL,
    Kind::Text,
    "Digest of the recommender's weights; null where the pipeline names none.",
);
const LLM_MODEL: ColumnSpec = nullable(
    columns::LLM_MODEL,
    Kind::Text,
    "Digest of the LLM's weights; null where the LLM had no part in the row or the pipeline names none.",
);

const RECOMMENDATION: [ColumnSpec; 21] = [
    USER,
    ITEM,
    nullable(columns::TITLE, Kind::Text, "From the item table, where one is mapped and has a title."),
    column(columns::RANK, Kind::Int32, "Final rank, 1-based."),
    column(
        columns::SCORE,
        Kind::Float64,
        "U of eq. 6, rounded to 1e-9: -c * (`alpha` * `llm_rank` + (1 - `alpha`) * `rec_rank`). Not comparable between days; read drift from `rec_score` and `alpha`.",
    ),
    column(columns::REC_RANK, Kind::Int32, "Place in the recommender's shortlist as it was fused, 1-based."),
    column(columns::REC_SCORE, Kind::Float32, "The recommender's score."),
    nullable(
        columns::LLM_RANK,
        Kind::Int32,
        "Place in the LLM's order of the shortlist, 1-based. Items that the LLM was not shown keep the recommender's place in that order, and null here.",
    ),
    nullable(columns::LLM_SCORE, Kind::Float32, "The LLM's score; null where it was not asked."),
    ALPHA,
    LONG_TAIL,
    INTERACTIONS,
    BUCKET,
    SOURCE,
    REASON,
    DIGEST,
    ASKED_AT,
    RUN_ID,
    REC_MODEL,
    LLM_MODEL,
    DS,
];

const ORDER: &str = "One row per user and rank, sorted by both. The order of a user's items is `score` from high to low, then `rec_rank`, then the item's place among the sorted ids.";

const SYSTEM: ColumnSpec = column(
    columns::SYSTEM,
    Kind::Text,
    "Whose order: `recommender`, `llm` (only over the users that it was asked for) or `fused`.",
);
const SCOPE: ColumnSpec = column(
    columns::USERS,
    Kind::Text,
    "`all`: every user with a held-out item. `asked`: those of them that the LLM was asked for, the same for each system.",
);
const SLICE: ColumnSpec =
    column(columns::BUCKET, Kind::Text, "`all`, or one third of the users: `tail`, `torso`, `head`.");
const METRIC: ColumnSpec = column(
    columns::METRIC,
    Kind::Text,
    "`Hit@k` or `NDCG@k` with the cut-off, as `NDCG@10`; of predicted ratings `RMSE` and `MAE`.",
);
const CUT_OFF: ColumnSpec = nullable(columns::K, Kind::Int32, "The cut-off of the metric; null of one that has none.");
const USERS_IN_MEAN: ColumnSpec =
    column(columns::N, Kind::Int64, "Number of users in the mean; of `RMSE` and `MAE`, of ratings.");
const FIT_ON: ColumnSpec = column(
    columns::WEIGHTS_FIT_ON,
    Kind::Text,
    "What the recommender's weights were fitted on: `train`, or `train+valid` after a refit.",
);
const AT_TEST: ColumnSpec = column(
    columns::HISTORY_AT_TEST,
    Kind::Text,
    "What was known of a user when ranking: `train+valid` or `train`. It governs recommender, N(u), LLM and neighbours alike.",
);
const PROTOCOL: [ColumnSpec; 4] = [
    AT_TEST,
    FIT_ON,
    column(
        columns::RANKING,
        Kind::Text,
        "`full`: held-out items are ranked among all items that the user has not interacted with, none sampled. `pairs`: held-out ratings are predicted, nothing is ranked.",
    ),
    TIES,
];

const TIES: ColumnSpec =
    column(columns::TIE_RULE, Kind::Text, "Which of a user's interactions of equal time is the last: `file order`.");

const EVALUATION: [ColumnSpec; 11] = [
    SYSTEM,
    SCOPE,
    SLICE,
    METRIC,
    CUT_OFF,
    column(
        columns::VALUE,
        Kind::Float64,
        "Mean over the users. A user whose held-out item is not on the list counts as 0. `RMSE` and `MAE` are over all held-out ratings.",
    ),
    USERS_IN_MEAN,
    PROTOCOL[0],
    PROTOCOL[1],
    PROTOCOL[2],
    PROTOCOL[3],
];

const METRICS: [ColumnSpec; 14] = [
    RUN_ID,
    column(columns::STAGE, Kind::Text, "Name of the `evaluate` stage, which tells several of a pipeline apart."),
    EVALUATION[0],
    EVALUATION[1],
    EVALUATION[2],
    EVALUATION[3],
    EVALUATION[4],
    EVALUATION[5],
    EVALUATION[6],
    EVALUATION[7],
    EVALUATION[8],
    EVALUATION[9],
    EVALUATION[10],
    DS,
];

/// The fused table: the k best items per user.
pub static RECOMMENDATIONS: TableSpec = TableSpec {
    name: "recommendations",
    about: "What is served: for every user the k best items, the recommender's shortlist and the LLM's order of it fused.",
    rows: ORDER,
    columns: &RECOMMENDATION,
};

/// The same over the whole shortlist.
pub static SHORTLIST: TableSpec = TableSpec {
    name: "shortlist",
    about: "The `shortlist` output of the `fuse` stage: the columns of `recommendations` over the whole shortlist, with what the LLM pushed out of the first k. The evaluation reads it, since it has the recommender's and the LLM's order in full.",
    rows: ORDER,
    columns: &RECOMMENDATION,
};

/// One row per run.
pub static RUNS: TableSpec = TableSpec {
    name: "runs",
    about: "What ran, what it cost and with which weights. Joins `metrics` and `recommendations` by `run_id`.",
    rows: "One row per run.",
    columns: &[
        RUN_ID,
        column(columns::PIPELINE, Kind::Text, "Name of the pipeline."),
        column(columns::VERSION, Kind::Text, "Version of tailfuse."),
        column(columns::STATUS, Kind::Text, "`published` or `current` (nothing new to publish)."),
        column(columns::STARTED_AT, Kind::Instant, "When the run started."),
        column(columns::FINISHED_AT, Kind::Instant, "When its tables were published."),
        column(columns::SECONDS, Kind::Float64, "Seconds between the two."),
        column(columns::SEED, Kind::Int64, "The pipeline's seed."),
        column(columns::N_USERS, Kind::Int64, "Users in the published table."),
        column(columns::N_ROWS, Kind::Int64, "Rows in the published table."),
        nullable(
            columns::USERS_ASKED,
            Kind::Int64,
            "Users that the LLM ranked for; null where the pipeline has no LLM.",
        ),
        nullable(columns::USERS_FAILED, Kind::Int64, "Users for which the LLM failed."),
        nullable(
            columns::LLM_PROMPTS,
            Kind::Int64,
            "Prompts that the LLM answered in this run; what an earlier run had paid for is not counted.",
        ),
        nullable(columns::LLM_TOKENS, Kind::Int64, "Tokens of those prompts."),
        nullable(columns::LLM_SECONDS, Kind::Float64, "Seconds that they took."),
        nullable(columns::A1, Kind::Float64, "a1 of eq. 7."),
        nullable(columns::A2, Kind::Float64, "a2 of eq. 7."),
        REC_MODEL,
        nullable(columns::LLM_MODEL, Kind::Text, "Digest of the LLM's weights."),
        DS,
    ],
};

/// The metrics of published runs.
pub static METRIC_ROWS: TableSpec = TableSpec {
    name: "metrics",
    about: "The metrics of each run, so that \"was the LLM worth it in the last thirty nights\" is a query.",
    rows: "One row per run, system, group of users, bucket and metric.",
    columns: &METRICS,
};

/// The `metrics` output of `evaluate`: [`METRIC_ROWS`] without the run.
pub static EVALUATION_METRICS: TableSpec = TableSpec {
    name: "evaluate.metrics",
    about: "The `metrics` output of the `evaluate` stage. A system has no row for a cut-off to which its order is not complete in the table that was evaluated: the k best fused items say nothing of the recommender's own first k.",
    rows: "One row per system, group of users, bucket and metric.",
    columns: &EVALUATION,
};

/// The `comparison` output of `evaluate`.
pub static EVALUATION_COMPARISON: TableSpec = TableSpec {
    name: "evaluate.comparison",
    about: "The `comparison` output of the `evaluate` stage: a paired t-test over users of each system against the recommender.",
    rows: "One row per system, group of users, bucket and metric.",
    columns: &[
        SYSTEM,
        column(columns::BASELINE, Kind::Text, "What it is compared with: `recommender`."),
        SCOPE,
        SLICE,
        METRIC,
        CUT_OFF,
        column(columns::N, Kind::Int64, "Number of users, the pairs."),
        column(
            columns::MEAN_DIFFERENCE,
            Kind::Float64,
            "Mean over the users of the system's value less the baseline's.",
        ),
        nullable(
            columns::T,
            Kind::Float64,
            "Student's t of the differences, n - 1 degrees of freedom; 0 where all are 0, null below two users and where all are the same but not 0.",
        ),
        nullable(
            columns::P,
            Kind::Float64,
            "Two-sided p value of `t`; 1 where all differences are 0, null where `t` is.",
        ),
    ],
};

/// The `grid` output of `calibrate`.
pub static CALIBRATION_GRID: TableSpec = TableSpec {
    name: "calibrate.grid",
    about: "The `grid` output of the `calibrate` stage: every pair of weights that was tried on validation. a1 = 0 is the recommender alone.",
    rows: "One row per pair of weights and mode, sorted by a1, then a2, then mode: the order of preference.",
    columns: &[
        column(columns::MODE, Kind::Text, "The LLM's mode; a1 = 0 is there once."),
        column(columns::A1, Kind::Float64, "a1 of eq. 7."),
        column(columns::A2, Kind::Float64, "a2 of eq. 7; 0 where a1 is 0, since it has no effect there."),
        column(
            columns::NDCG_10,
            Kind::Float64,
            "Mean NDCG@10 on the validation items of the users that the LLM was asked for.",
        ),
        column(
            columns::DIFFERENCE,
            Kind::Float64,
            "Mean over the users of the best pair's NDCG@10 less this one's, at least 0.",
        ),
        nullable(columns::SE_DIFF, Kind::Float64, "Standard error of that mean; null below two users."),
        column(columns::BEST, Kind::Bool, "Whether its mean is the highest (the first such pair)."),
        column(
            columns::CHOSEN,
            Kind::Bool,
            "Whether it was chosen: the first pair whose `difference` is at most its `se_diff`.",
        ),
    ],
};

/// The `tie_orders` output of `evaluate`.
pub static EVALUATION_TIES: TableSpec = TableSpec {
    name: "evaluate.tie_orders",
    about: "The `tie_orders` output of the `evaluate` stage: how far the recommender's figures depend on which of a user's interactions of equal time counts as the last. Each draw orders them at random, splits anew, fits the same hyper-parameters with the same seed for as many epochs, and ranks.",
    rows: "One row per metric.",
    columns: &[
        METRIC,
        CUT_OFF,
        column(columns::FILE_ORDER, Kind::Float64, "The figure of the model as it is, ties in file order."),
        column(
            columns::FILE_ORDER_REFIT,
            Kind::Float64,
            "The figure of file order, fitted again as the draws are: what their mean compares with.",
        ),
        column(columns::MEAN, Kind::Float64, "Mean over the draws."),
        nullable(columns::SD, Kind::Float64, "Standard deviation over the draws (of a sample); null of a single one."),
        column(columns::MIN, Kind::Float64, "Least of the draws."),
        column(columns::MAX, Kind::Float64, "Greatest of the draws."),
        column(columns::DRAWS, Kind::Int32, "Number of draws."),
        USERS_IN_MEAN,
        AT_TEST,
        FIT_ON,
    ],
};

const SEED_OF_FIT: ColumnSpec =
    column(columns::SEED, Kind::Int64, "Seed of the fit; a `train` stage with this `seed` fits the same model.");
const VALID_NAME: ColumnSpec =
    column(columns::VALID_METRIC, Kind::Text, "What validation measures: `NDCG@10`, or `RMSE` of a rating model.");
const VALID_VALUE: ColumnSpec =
    nullable(columns::VALID, Kind::Float64, "The best epoch's value; null where the fit did not end well.");

/// The `trials` output of `search`.
pub static SEARCH_TRIALS: TableSpec = TableSpec {
    name: "search.trials",
    about: "The `trials` output of the `search` stage: every setting that was tried, and what it came to on validation.",
    rows: "One row per setting and seed, in the order of the trials.",
    columns: &[
        column(columns::TRIAL, Kind::Int32, "Number of the setting, 1-based."),
        SEED_OF_FIT,
        column(columns::SETTING, Kind::Text, "What was drawn from the space, as JSON."),
        column(columns::HYPER, Kind::Text, "All hyper-parameters, as JSON."),
        VALID_NAME,
        VALID_VALUE,
        nullable(
            columns::BEST_EPOCH,
            Kind::Int32,
            "The best epoch on validation; null where the fit did not end well.",
        ),
        nullable(columns::EPOCHS, Kind::Int32, "Epochs that were run; null where the fit did not end well."),
        column(columns::SECONDS, Kind::Float64, "Seconds of the fit."),
        column(
            columns::STATUS,
            Kind::Text,
            "`ok`, `diverged` (the loss was no longer finite) or `failed` (the model refuses the setting).",
        ),
        nullable(columns::MESSAGE, Kind::Text, "Why it is not `ok`."),
        column(columns::CHOSEN, Kind::Bool, "Whether it is the setting with the best mean over its seeds."),
    ],
};

/// The `confirmed` output of `search`.
pub static SEARCH_CONFIRMED: TableSpec = TableSpec {
    name: "search.confirmed",
    about: "The `confirmed` output of the `search` stage: the best setting on test, which chose nothing. Mean and spread are a query: `select metric, avg(value), stddev(value) from X.confirmed group by metric`.",
    rows: "One row per seed and metric.",
    columns: &[
        SEED_OF_FIT,
        METRIC,
        CUT_OFF,
        column(columns::VALUE, Kind::Float64, "The figure on test."),
        USERS_IN_MEAN,
        VALID_NAME,
        VALID_VALUE,
        column(columns::BEST_EPOCH, Kind::Int32, "The best epoch on validation."),
        FIT_ON,
        AT_TEST,
        TIES,
    ],
};

/// The `instructions` output of `instruct`.
pub static INSTRUCTIONS: TableSpec = TableSpec {
    name: "instruct.instructions",
    about: "The `instructions` output of the `instruct` stage: what the LLM is tuned on, made of train interactions only (section 4.5).",
    rows: "One row per instruction, tasks mixed in a random order of the seed.",
    columns: &[
        column(columns::TASK, Kind::Text, "`pairwise`, `list`, `side_info`, `ranking` or `rating`."),
        column(columns::USER_ID, Kind::User, "The user whose interactions it is made of."),
        column(columns::SYSTEM, Kind::Text, "The system message."),
        column(columns::PROMPT, Kind::Text, "The user message."),
        column(columns::RESPONSE, Kind::Text, "The answer; tuning has its loss on these tokens only."),
        column(columns::SPLIT, Kind::Text, "`train`, or `held-out`: all instructions of a user are in one of them."),
        column(
            columns::AUGMENTED,
            Kind::Bool,
            "Whether the prompt has a similar user's history or a recommender's prediction.",
        ),
        column(columns::TOKENS, Kind::Int32, "Tokens of the whole conversation, chat template and answer included."),
    ],
};

/// The `counts` output of `instruct`.
pub static INSTRUCTION_COUNTS: TableSpec = TableSpec {
    name: "instruct.counts",
    about: "The `counts` output of the `instruct` stage: how many instructions there are of each kind.",
    rows: "One row per task, `augmented` and `split` that occurs, sorted by them.",
    columns: &[
        column(columns::TASK, Kind::Text, "The task."),
        column(columns::AUGMENTED, Kind::Bool, "Whether the prompts have augmented fields."),
        column(columns::SPLIT, Kind::Text, "`train` or `held-out`."),
        column(columns::INSTRUCTIONS, Kind::Int64, "Instructions."),
        column(columns::N_USERS, Kind::Int64, "Users with such an instruction."),
        column(columns::TOKENS, Kind::Int64, "Tokens of all of them."),
        column(columns::TOKENS_MAX, Kind::Int32, "Tokens of the longest one."),
    ],
};

/// The table of the rating task.
pub static PREDICTIONS: TableSpec = TableSpec {
    name: "predictions",
    about: "The table of the rating task. It is declared so that readers can be written against it; no stage of this version makes it.",
    rows: "One row per user and item, sorted by both.",
    columns: &[
        USER,
        ITEM,
        column(columns::PREDICTED_RATING, Kind::Float64, "U of eq. 6, in the unit of the ratings."),
        column(columns::REC_SCORE, Kind::Float32, "The recommender's prediction."),
        nullable(columns::LLM_SCORE, Kind::Float32, "The LLM's prediction; null where it was not asked."),
        ALPHA,
        LONG_TAIL,
        INTERACTIONS,
        BUCKET,
        SOURCE,
        REASON,
        DIGEST,
        ASKED_AT,
        RUN_ID,
        REC_MODEL,
        LLM_MODEL,
        DS,
    ],
};

/// The `audits` output of `audit`.
pub static AUDITS: TableSpec = TableSpec {
    name: "audit.audits",
    about: "The `audits` output of the `audit` stage: what was asked of a table before it was published.",
    rows: "One row per audit, sorted by name.",
    columns: &[
        column(columns::AUDIT, Kind::Text, "Name of the audit."),
        nullable(columns::VALUE, Kind::Float64, "What its query gave; null where it was skipped."),
        nullable(columns::MIN, Kind::Float64, "Least value that passes."),
        nullable(columns::MAX, Kind::Float64, "Greatest value that passes."),
        nullable(columns::PASSED, Kind::Bool, "Whether the value lies within the bounds; null where it was skipped."),
        nullable(columns::DETAIL, Kind::Text, "What offends (the first rows), or why it was skipped."),
    ],
};

/// All declared tables in the order of the docs.
pub static TABLES: &[&TableSpec] = &[
    &RECOMMENDATIONS,
    &SHORTLIST,
    &RUNS,
    &METRIC_ROWS,
    &PREDICTIONS,
    &EVALUATION_METRICS,
    &EVALUATION_COMPARISON,
    &EVALUATION_TIES,
    &SEARCH_TRIALS,
    &SEARCH_CONFIRMED,
    &CALIBRATION_GRID,
    &AUDITS,
    &INSTRUCTIONS,
    &INSTRUCTION_COUNTS,
];

/// The declared table of that name.
pub fn find(name: &str) -> Option<&'static TableSpec> {
    TABLES.iter().copied().find(|t| t.name == name)
}

/// The reference page of the declared tables, `docs/tables.md`.
pub fn tables_markdown() -> String {
    let mut page = String::from(
        "# Tables\n\n<!-- Generated from src/tables/schemas.rs by `just docs`; a test compares. -->\n\n\
         The tables that tailfuse publishes, and those outputs of stages that people query. Equations are those of\n\
         arXiv 2401.13870. A column is never null unless its type says so.\n",
    );
    for table in TABLES {
        let _ = write!(
            page,
            "\n## {}\n\n{}\n\n{}\n\n| column | type | meaning |\n| --- | --- | --- |\n",
            table.name, table.about, table.rows
        );
        for c in table.columns {
            let null = if c.nullable { ", nullable" } else { "" };
            let _ = writeln!(page, "| {} | {}{null} | {} |", c.name, c.kind.name(), c.about);
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_column_has_a_name_of_its_own_and_a_meaning() {
        for table in TABLES {
            let names: BTreeSet<&str> = table.columns.iter().map(|c| c.name).collect();
            assert_eq!(names.len(), table.columns.len(), "{}: a column occurs twice", table.name);
            for c in table.columns {
                assert!(c.about.ends_with('.'), "{}.{}: say what it means", table.name, c.name);
                assert!(!c.about.contains('|'), "{}.{}: a bar breaks the page's table", table.name, c.name);
            }
        }
        let names: BTreeSet<&str> = TABLES.iter().map(|t| t.name).collect();
        assert_eq!(names.len(), TABLES.len());
    }

    #[test]
    fn the_fused_table_has_the_columns_of_the_contract() {
        let schema = RECOMMENDATIONS.schema(&DataType::Int64, &DataType::Utf8);
        let got: Vec<(String, String, bool)> =
            schema.fields().iter().map(|f| (f.name().clone(), f.data_type().to_string(), f.is_nullable())).collect();
        let want = [
            ("user_id", "Int64", false),
            ("item_id", "Utf8", false),
            ("title", "Utf8", true),
            ("rank", "Int32", false),
            ("score", "Float64", false),
            ("rec_rank", "Int32", false),
            ("rec_score", "Float32", false),
            ("llm_rank", "Int32", true),
            ("llm_score", "Float32", true),
            ("alpha", "Float64", false),
            ("long_tail_coefficient", "Float64", false),
            ("interactions", "Int64", false),
            ("bucket", "Utf8", false),
            ("source", "Utf8", false),
            ("reason", "Utf8", true),
            ("prompt_digest", "Utf8", true),
            ("llm_asked_at", "Timestamp(µs, \"UTC\")", true),
            ("run_id", "Utf8", false),
            ("rec_model", "Utf8", true),
            ("llm_model", "Utf8", true),
        ];
        assert_eq!(got, want.map(|(n, t, null)| (n.to_owned(), t.to_owned(), null)));
    }

    #[test]
    fn tables_are_found_by_name() {
        assert_eq!(find("metrics").map(|t| t.columns.len()), Some(14));
        assert!(find("metric").is_none());
    }
}
