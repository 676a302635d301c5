//! What asking will take, before anything is asked.
//!
//! In: the counters of the `prompt` stage, the config, the model's file. Out: bounds. The ledger may make it less.

use std::path::Path;

use serde_json::{Map, Value};

use super::config::Budget;
use crate::llm::options::{LlmOptions, Memory};
use crate::llm::weights::Weights;
use crate::stages::context::Estimate;

/// Users, prompts and tokens that a budget buys of what the `prompt` stage wrote; what is not known stays out.
pub(super) fn asked(budget: Budget, prompts: Option<&Map<String, Value>>) -> Estimate {
    let of = |key: &str| prompts.and_then(|p| p.get(key)).and_then(Value::as_u64);
    let skipped = of("skipped_no_title").unwrap_or(0) + of("skipped_cold_user").unwrap_or(0);
    let (Some(users), Some(written), Some(tokens)) = (of("users"), of("prompts"), of("prompt_tokens")) else {
        return Estimate { users: budget.users, tokens: budget.tokens, ..Estimate::default() };
    };
    let all = users.saturating_sub(skipped);
    let by_tokens = |most: u64| if tokens == 0 { all } else { (all as f64 * most as f64 / tokens as f64) as u64 };
    let users = all.min(budget.users.unwrap_or(all)).min(budget.tokens.map_or(all, by_tokens));
    let share = |n: u64| if all == 0 { 0 } else { (n as f64 * users as f64 / all as f64).round() as u64 };
    let tokens = share(tokens).min(budget.tokens.unwrap_or(u64::MAX));
    Estimate { users: Some(users), prompts: Some(share(written)), tokens: Some(tokens), memory_bytes: None }
}

/// Bytes that a model takes in this process at most. `None` where the file is not here yet, or is none.
pub(super) fn memory(path: &Path) -> Option<u64> {
    let weights = Weights::open(path).ok()?;
    Some(Memory::before_loading(weights.config(), &LlmOptions::default()).total() as u64)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_budget_buys_its_share() {
        let counters = json!({ "users": 110, "skipped_no_title": 8, "skipped_cold_user": 2, "prompts": 200, "prompt_tokens": 40_000 });
        let counters = counters.as_object();
        let of = |users, tokens| {
            let e = asked(Budget { users, tokens, minutes: None }, counters);
            (e.users, e.prompts, e.tokens)
        };
        assert_eq!(of(None, None), (Some(100), Some(200), Some(40_000)));
        assert_eq!(of(Some(25), None), (Some(25), Some(50), Some(10_000)));
        assert_eq!(of(Some(500), Some(20_000)), (Some(50), Some(100), Some(20_000)));
        let unknown = asked(Budget { users: Some(3), ..Budget::default() }, None);
        assert_eq!((unknown.users, unknown.prompts, unknown.tokens), (Some(3), None, None));
    }

    #[test]
    fn memory_is_known_from_the_header() {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llm/tiny");
        assert!(memory(&tiny).unwrap() >= 4 * 20_640 + (512 << 20));
        assert_eq!(memory(Path::new("/nowhere")), None);
    }
}
