//! Tables as examples: instructions, or lists of titles, to learn from and held out.
//!
//! In: [`Tables`], a tokenizer. Out: [`Examples`].

use sha2::{Digest, Sha256};

use super::{FinetuneConfig, Objective};
use crate::columns::{PROMPT, RESPONSE, SPLIT, SYSTEM, TITLE, USER_ID};
use crate::error::{Error, Result};
use crate::llm::ChatTokenizer;
use crate::llm::tune::Example;
use crate::llm::tune::text::Encoder;
use crate::stages::context::Cancel;
use crate::stages::train::savings::hex;
use crate::tables::{Id, Table};

/// `split` of rows that are not learned.
pub(super) const HELD_OUT: &str = "held-out";

/// Of so many users one is held out where no examples are.
const HELD_OUT_OF: u64 = 20;

/// The inputs.
pub(super) struct Tables {
    pub examples: Option<Table>,
    pub histories: Option<Table>,
}

/// What is learned from and what is measured.
#[derive(Debug, Default)]
pub(super) struct Examples {
    pub train: Vec<Example>,
    pub held_out: Vec<Example>,
    /// Instructions that were left out for their length.
    pub too_long: usize,
}

impl Examples {
    /// Encodes the tables.
    ///
    /// # Errors
    /// A column is missing, null, or of another kind; the model has no chat template (exit 65); a stop was asked for.
    pub fn read(
        tables: &Tables,
        config: &FinetuneConfig,
        chat: &ChatTokenizer,
        seed: u64,
        cancel: &Cancel,
    ) -> Result<Self> {
        let encoder = Encoder::new(chat, config.max_tokens)?;
        let mut all = Examples::default();
        if let Some(table) = &tables.examples {
            all.instructions(table, &encoder, config.objective, cancel)?;
        }
        if let (Objective::Titles, Some(table)) = (config.objective, &tables.histories) {
            let held_out = tables.examples.is_none().then_some(seed);
            all.titles(table, &encoder, &config.titles_prompt, held_out, cancel)?;
        }
        Ok(all)
    }

    fn instructions(
        &mut self,
        table: &Table,
        encoder: &Encoder<'_>,
        objective: Objective,
        cancel: &Cancel,
    ) -> Result<()> {
        let column = |name: &str| table.strings(name).map_err(|e| e.at("input `examples`"));
        let (systems, prompts) = (column(SYSTEM)?, column(PROMPT)?);
        let (responses, splits) = (column(RESPONSE)?, column(SPLIT)?);
        let rows = systems.into_iter().zip(prompts).zip(responses.into_iter().zip(splits));
        for (n, ((system, prompt), (response, split))) in rows.enumerate() {
            if n.is_multiple_of(256) {
                cancel.check()?;
            }
            let held_out = match split.as_deref() {
                Some("train") => false,
                Some(HELD_OUT) => true,
                other => {
                    let what = format!("input `examples`, row {}: `split` is {other:?}", n + 1);
                    return Err(Error::data(what).with_help("it is \"train\" or \"held-out\""));
                }
            };
            if objective == Objective::Titles && !held_out {
                continue;
            }
            let text = |name: &str, value: Option<String>| {
                value.ok_or_else(|| Error::data(format!("input `examples`, row {}: `{name}` is null", n + 1)))
            };
            let (prompt, response) = (text(PROMPT, prompt)?, text(RESPONSE, response)?);
            match encoder.instruction(&system.unwrap_or_default(), &prompt, &response)? {
                None => self.too_long += 1,
                Some(example) if held_out => self.held_out.push(example),
                Some(example) => self.train.push(example),
            }
        }
        Ok(())
    }

    /// Lists of titles by user; with a seed some users are held out.
    fn titles(
        &mut self,
        table: &Table,
        encoder: &Encoder<'_>,
        prompt: &str,
        held_out: Option<u64>,
        cancel: &Cancel,
    ) -> Result<()> {
        let users = table.ids(USER_ID).map_err(|e| e.at("input `histories`"))?;
        let titles = table.strings(TITLE).map_err(|e| e.at("input `histories`"))?;
        let mut order: Vec<Id> = Vec::new();
        let mut lists = std::collections::HashMap::<Id, Vec<&str>>::new();
        for (n, title) in titles.iter().enumerate() {
            let user = users.get(n);
            let list = lists.entry(user.clone()).or_insert_with(|| {
                order.push(user);
                Vec::new()
            });
            // Items without a title are not in the list.
            list.extend(title.as_deref());
        }
        for user in order {
            cancel.check()?;
            let list = lists.remove(&user).unwrap_or_default();
            let apart = held_out.is_some_and(|seed| is_held_out(&user, seed));
            let to = if apart { &mut self.held_out } else { &mut self.train };
            to.extend(encoder.titles(prompt, &list)?);
        }
        Ok(())
    }

    /// sha256 (hex) of all examples in their order.
    pub fn digest(&self) -> String {
        let mut digest = Sha256::new();
        for part in [&self.train, &self.held_out] {
            digest.update((part.len() as u64).to_le_bytes());
            for example in part {
                digest.update((example.ids.len() as u64).to_le_bytes());
                for (id, learned) in example.ids.iter().zip(&example.learned) {
                    digest.update(id.to_le_bytes());
                    digest.update([u8::from(*learned)]);
                }
            }
        }
        hex(digest.finalize().as_slice())
    }
}

/// Whether a user is held out: a function of the seed and the user alone.
fn is_held_out(user: &Id, seed: u64) -> bool {
    let digest = Sha256::digest(format!("{seed} {user}").as_bytes());
    let mut first = [0u8; 8];
    first.copy_from_slice(&digest[..8]);
    u64::from_le_bytes(first).is_multiple_of(HELD_OUT_OF)
}
