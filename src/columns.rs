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
/// string: the users that a figure is over, `all` or `asked`.
pub const USERS: &str = "users";
/// string: name of a metric with its cut-off, `NDCG@10`.
pub const METRIC: &str = "metric";
/// int32: cut-off of a metric.
pub const K: &str = "k";
/// float64: value of a metric.
pub const VALUE: &str = "value";
/// int64: how many users a figure is over.
pub const N: &str = "n";
/// string: what was known of a user when ranking, `train+valid` or `train`.
pub const HISTORY_AT_TEST: &str = "history_at_test";
/// string: what the recommender's weights were fitted on.
pub const WEIGHTS_FIT_ON: &str = "weights_fit_on";
/// string: `full`, every item that the user has not interacted with is ranked.
pub const RANKING: &str = "ranking";
/// string: which of the interactions of equal time is the last.
pub const TIE_RULE: &str = "tie_rule";
/// string: the system that another one is compared with.
pub const BASELINE: &str = "baseline";
/// float64: mean of paired differences.
pub const MEAN_DIFFERENCE: &str = "mean_difference";
/// float64, nullable: Student's t.
pub const T: &str = "t";
/// float64, nullable: two-sided p value.
pub const P: &str = "p";
/// float64: a1 of eq. 7.
pub const A1: &str = "a1";
/// float64: a2 of eq. 7.
pub const A2: &str = "a2";
/// float64: mean NDCG@10 of a pair of weights.
pub const NDCG_10: &str = "ndcg_10";
/// float64: mean difference of the best pair of weights to this one.
pub const DIFFERENCE: &str = "difference";
/// float64, nullable: standard error of the paired difference to the best pair of weights.
pub const SE_DIFF: &str = "se_diff";
/// boolean: the pair of weights with the highest mean.
pub const BEST: &str = "best";
/// boolean: the pair of weights that was chosen.
pub const CHOSEN: &str = "chosen";
/// string: name of the pipeline.
pub const PIPELINE: &str = "pipeline";
/// string: version of tailfuse.
pub const VERSION: &str = "version";
/// string: how a run ended.
pub const STATUS: &str = "status";
/// timestamp (microseconds, UTC): when a run started.
pub const STARTED_AT: &str = "started_at";
/// timestamp (microseconds, UTC): when a run's tables were published.
pub const FINISHED_AT: &str = "finished_at";
/// float64: seconds of a run.
pub const SECONDS: &str = "seconds";
/// int64: the pipeline's seed.
pub const SEED: &str = "seed";
/// int64: users in the published table.
pub const N_USERS: &str = "n_users";
/// int64: rows in the published table.
pub const N_ROWS: &str = "n_rows";
/// int64, nullable: users that the LLM ranked for.
pub const USERS_ASKED: &str = "users_asked";
/// int64, nullable: users for which the LLM failed.
pub const USERS_FAILED: &str = "users_failed";
/// int64, nullable: prompts that the LLM answered.
pub const LLM_PROMPTS: &str = "llm_prompts";
/// int64, nullable: tokens of those prompts.
pub const LLM_TOKENS: &str = "llm_tokens";
/// float64, nullable: seconds that they took.
pub const LLM_SECONDS: &str = "llm_seconds";
/// float64: predicted rating, U of eq. 6.
pub const PREDICTED_RATING: &str = "predicted_rating";
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
/// string: the system message of a prompt; in evaluations, whose order it is (`recommender`, `llm`, `fused`).
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
/// int32, 1-based: number of a setting that a search tried.
pub const TRIAL: &str = "trial";
/// string: what a search drew, as JSON.
pub const SETTING: &str = "setting";
/// string: hyper-parameters in full, as JSON.
pub const HYPER: &str = "hyper";
/// string: name of a validation metric.
pub const VALID_METRIC: &str = "valid_metric";
/// float64, nullable: value of a validation metric.
pub const VALID: &str = "valid";
/// int32: the epoch that was the best on validation.
pub const BEST_EPOCH: &str = "best_epoch";
/// int32: number of epochs that were run.
pub const EPOCHS: &str = "epochs";
/// string, nullable: why a fit did not end well.
pub const MESSAGE: &str = "message";
/// string: name of a stage in the pipeline file.
pub const STAGE: &str = "stage";
/// float64: a figure with ties of time in file order.
pub const FILE_ORDER: &str = "file_order";
/// float64: the same, of a model fitted again as those of the draws are.
pub const FILE_ORDER_REFIT: &str = "file_order_refit";
/// float64: mean over draws.
pub const MEAN: &str = "mean";
/// float64, nullable: standard deviation over draws.
pub const SD: &str = "sd";
/// float64: least of the draws.
pub const MIN: &str = "min";
/// float64: greatest of the draws.
pub const MAX: &str = "max";
/// int32: number of draws.
pub const DRAWS: &str = "draws";
/// string: what an instruction asks, `pairwise`, `list`, `side_info`, `ranking` or `rating`.
pub const TASK: &str = "task";
/// string: the answer of an instruction.
pub const RESPONSE: &str = "response";
/// string: `train`, or `held-out` for what tuning is measured on.
pub const SPLIT: &str = "split";
/// boolean: whether a prompt has a similar user's history or a recommender's prediction.
pub const AUGMENTED: &str = "augmented";
/// int32: tokens of a whole conversation, answer included, or of a prompt and of what was scored after it; int64 where
/// it is a sum.
pub const TOKENS: &str = "tokens";
/// int32: tokens of the longest conversation.
pub const TOKENS_MAX: &str = "tokens_max";
/// int64: number of instructions.
pub const INSTRUCTIONS: &str = "instructions";
/// string (sha256, hex): what is known of a user and how prompts tell it.
pub const HISTORY_DIGEST: &str = "history_digest";
/// list of int32, 1-based: places of a prompt's candidates in the recommender's shortlist, in the order shown.
pub const CANDIDATE_PLACES: &str = "candidate_places";
/// string (sha256, hex): how the LLM was asked: engine, weights, mode and settings.
pub const SETTINGS: &str = "settings";
/// list of strings: items in the order that the LLM gave them.
pub const ITEMS: &str = "items";
/// list of float32: the LLM's scores.
pub const SCORES: &str = "scores";
/// int32: tokens that the LLM wrote.
pub const ANSWER_TOKENS: &str = "answer_tokens";
/// string, nullable: what the LLM wrote, cut.
pub const ANSWER: &str = "answer";
/// string: how the LLM was asked, such as `label`.
pub const MODE: &str = "mode";
/// int32: prompts of a user that were answered.
pub const PROMPTS: &str = "prompts";
/// int32: different items that came first in a user's prompts.
pub const FIRST_PLACES: &str = "first_places";
/// float64 in [0, 1]: share of a user's later prompts whose first item is not that of the first prompt.
pub const FIRST_CHANGED: &str = "first_changed";
/// float64 in [-1, 1]: mean of Kendall's tau between the order of a user's first prompt and those of the later ones.
pub const KENDALL_TAU: &str = "kendall_tau";
/// string: name of an audit.
pub const AUDIT: &str = "audit";
/// boolean, nullable: whether a value lies within its bounds; null where it was not looked at.
pub const PASSED: &str = "passed";
/// string, nullable: what offends, or why there is no value.
pub const DETAIL: &str = "detail";
