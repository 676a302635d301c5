//! Whom the LLM is asked for: tail first, within the budget, less those whose earlier order still holds.
//!
//! In: the users with prompts, N(u), the budget, what the ledger says of a user. Out: three lists that hold everyone once.

use std::collections::HashMap;

use rand::SeedableRng;
use rand::seq::SliceRandom;

use super::config::{Budget, Order};
use super::questions::Prompts;
use crate::error::Result;
use crate::tables::Id;

/// All users with a prompt, in the order in which they are asked.
pub(super) fn asking_order(prompts: &Prompts, interactions: &HashMap<Id, i64>, order: Order, seed: u64) -> Vec<Id> {
    let mut users: Vec<Id> = prompts.rows.keys().cloned().collect();
    match order {
        // A stable sort over users in id order: ties go by id. A user the table lacks has no history.
        Order::TailFirst => users.sort_by_key(|u| interactions.get(u).copied().unwrap_or(0)),
        Order::Random => users.shuffle(&mut rand_chacha::ChaCha8Rng::seed_from_u64(seed)),
    }
    users
}

/// What the ledger says of a user.
pub(super) enum Known<R> {
    /// Nothing that helps.
    Nothing,
    /// An earlier order may be kept.
    Reusable(R),
    /// Exactly these prompts were answered; and an earlier order, where there is one.
    Answered(Option<R>),
}

/// Everyone once.
pub(super) struct Whom<R> {
    /// Whose prompts are asked, or were answered already.
    pub(super) asked: Vec<Id>,
    /// Who keeps an earlier order.
    pub(super) reused: Vec<(Id, R)>,
    /// Who is left out by the budget.
    pub(super) left_out: Vec<Id>,
}

/// Divides the users. Who was asked exactly this counts against the budget like anyone who is asked, so that a run that
/// was killed asks the same users when it is started again; who keeps an earlier order does not.
pub(super) fn divide<R>(
    prompts: &Prompts,
    order: Vec<Id>,
    budget: Budget,
    mut known: impl FnMut(&Id) -> Result<Known<R>>,
) -> Result<Whom<R>> {
    let mut whom = Whom { asked: Vec::new(), reused: Vec::new(), left_out: Vec::new() };
    let (mut tokens, mut full) = (0u64, false);
    for user in order {
        let earlier = match known(&user)? {
            Known::Reusable(earlier) => {
                whom.reused.push((user, earlier));
                continue;
            }
            Known::Answered(earlier) => earlier,
            Known::Nothing => None,
        };
        if !full {
            tokens += prompts.rows[&user].iter().map(|&r| prompts.prompts[r].tokens).sum::<u64>();
            full = budget.users.is_some_and(|most| whom.asked.len() as u64 >= most)
                || budget.tokens.is_some_and(|most| tokens > most);
        }
        match (full, earlier) {
            (false, _) => whom.asked.push(user),
            (true, Some(earlier)) => whom.reused.push((user, earlier)),
            (true, None) => whom.left_out.push(user),
        }
    }
    Ok(whom)
}

#[cfg(test)]
mod tests {
    use arrow::datatypes::DataType;

    use super::super::questions::Prompt;
    use super::*;

    /// Users 0 to 4 with one prompt of 100 tokens each.
    fn five() -> Prompts {
        let prompt = |_| Prompt {
            candidates: crate::tables::IdColumn::Int(vec![7]),
            titles: vec!["x".to_owned()],
            tokens: 100,
            ..Prompt::default()
        };
        Prompts {
            prompts: (0..5).map(prompt).collect(),
            rows: (0..5).map(|u| (Id::Int(u as i64), vec![u])).collect(),
            ids_are_int: true,
            item_type: DataType::Int64,
        }
    }

    fn ids(users: &[Id]) -> Vec<String> {
        users.iter().map(Id::to_string).collect()
    }

    #[test]
    fn the_tail_comes_first_and_ties_go_by_id() {
        let interactions = [(0, 9), (1, 3), (2, 3), (3, 50)].map(|(u, n)| (Id::Int(u), n)).into();
        // User 4 is not in the table: nothing is known of them.
        assert_eq!(ids(&asking_order(&five(), &interactions, Order::TailFirst, 1)), ["4", "1", "2", "0", "3"]);
        let draw = |seed| ids(&asking_order(&five(), &interactions, Order::Random, seed));
        assert_eq!(draw(3), draw(3));
        assert!((0..20).any(|seed| draw(seed) != draw(3)));
    }

    #[test]
    fn the_smaller_budget_counts() {
        let order: Vec<Id> = (0..5).map(Id::Int).collect();
        for (users, tokens, expected) in [
            (None, None, 5),
            (Some(2), None, 2),
            (Some(0), None, 0),
            (Some(9), Some(350), 3),
            (Some(2), Some(350), 2),
            (None, Some(99), 0),
            (None, Some(500), 5),
        ] {
            let whom =
                divide(&five(), order.clone(), Budget { users, tokens, minutes: None }, |_| Ok(Known::<()>::Nothing))
                    .unwrap();
            assert_eq!((whom.asked.len(), whom.left_out.len()), (expected, 5 - expected), "{users:?} {tokens:?}");
        }
    }

    #[test]
    fn who_keeps_an_order_leaves_the_budget_to_others() {
        let order: Vec<Id> = (0..5).map(Id::Int).collect();
        let budget = Budget { users: Some(2), ..Budget::default() };
        let known = |user: &Id| {
            Ok(match user {
                Id::Int(0 | 2) => Known::Reusable(()),
                Id::Int(4) => Known::Answered(Some(())),
                _ => Known::Nothing,
            })
        };
        let whom = divide(&five(), order, budget, known).unwrap();
        assert_eq!(ids(&whom.asked), ["1", "3"]);
        // 4 was answered and the budget is used up: the earlier order is there all the same.
        assert_eq!(whom.reused.iter().map(|(u, ())| u.to_string()).collect::<Vec<_>>(), ["0", "2", "4"]);
        assert!(whom.left_out.is_empty());
    }
}
