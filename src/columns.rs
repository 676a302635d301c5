//! The names of the columns, in one place. Nothing else spells a column out.

/// The user; int64 or string, as in the source.
pub const USER_ID: &str = "user_id";
/// The item; int64 or string, as in the source.
pub const ITEM_ID: &str = "item_id";
/// float32; optional in a log of implicit feedback.
pub const RATING: &str = "rating";
/// int64. Integers keep their unit; Arrow timestamps become microseconds.
pub const TIMESTAMP: &str = "timestamp";
/// int64, added by the reader: files in path order, then rows in file order. The tie rule.
pub const ROW_ID: &str = "row_id";
/// int32, 0-based place in the user's time-ordered history.
pub const POSITION: &str = "position";
/// string, from the item table.
pub const TITLE: &str = "title";
/// int32, 1-based final rank.
pub const RANK: &str = "rank";
/// float64, U of eq. 6.
pub const SCORE: &str = "score";
/// int32, 1-based place in the recommender's shortlist.
pub const REC_RANK: &str = "rec_rank";
/// float32, the recommender's score.
pub const REC_SCORE: &str = "rec_score";
/// int32, 1-based place in the LLM's order; null where it was not asked.
pub const LLM_RANK: &str = "llm_rank";
/// float32, the LLM's score (a log-probability); null where it was not asked.
pub const LLM_SCORE: &str = "llm_score";
/// float64, weight of the LLM for this user (eq. 7).
pub const ALPHA: &str = "alpha";
/// float64, l_u of eq. 5.
pub const LONG_TAIL_COEFFICIENT: &str = "long_tail_coefficient";
/// int64, N(u): the number of the user's known interactions.
pub const INTERACTIONS: &str = "interactions";
/// string: `head`, `torso` or `tail` (terciles of N(u)).
pub const BUCKET: &str = "bucket";
/// string: `fused`, `reused`, `recommender`, `fallback`, `popularity`.
pub const SOURCE: &str = "source";
/// string, nullable: why `source` is not `fused`.
pub const REASON: &str = "reason";
/// string (sha256, hex), nullable: joins the ledger.
pub const PROMPT_DIGEST: &str = "prompt_digest";
/// timestamp (microseconds, UTC), nullable: when the LLM answered.
pub const LLM_ASKED_AT: &str = "llm_asked_at";
/// string: the run that wrote the row.
pub const RUN_ID: &str = "run_id";
/// string: digest of the recommender's weights.
pub const REC_MODEL: &str = "rec_model";
/// string: digest of the LLM's weights.
pub const LLM_MODEL: &str = "llm_model";
/// Partition column: the day of the run.
pub const DS: &str = "ds";
/// list of float32: a row of an embedding table, `[dim]`.
pub const EMBEDDING: &str = "embedding";
/// The other user of a similar pair.
pub const NEIGHBOUR_ID: &str = "neighbour_id";
/// float64 in [-1, 1]: cosine similarity (eq. 4).
pub const SIMILARITY: &str = "similarity";
/// int32, 0-based: which order of the candidates a prompt shows.
pub const PERMUTATION: &str = "permutation";
/// list of ids: the candidates in the order in which the prompt shows them.
pub const CANDIDATES: &str = "candidates";
/// list of strings: their titles, same order.
pub const CANDIDATE_TITLES: &str = "candidate_titles";
/// string: the system message of a prompt.
pub const SYSTEM: &str = "system";
/// string: the user message of a prompt.
pub const PROMPT: &str = "prompt";
/// int32: length of the whole chat in tokens.
pub const PROMPT_TOKENS: &str = "prompt_tokens";
/// bool: whether the user has a test interaction that counts.
pub const EVALUATED: &str = "evaluated";
/// int32: titles of the user's history that a prompt shows.
pub const HISTORY_SHOWN: &str = "history_shown";
/// int32: titles that a prompt left out to stay within its token budget.
pub const TITLES_TRIMMED: &str = "titles_trimmed";
