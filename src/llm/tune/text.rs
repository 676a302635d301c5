//! Texts as examples: instructions with their responses, and lists of titles.
//!
//! In: a model's tokenizer and chat template; a conversation or titles. Out: [`Example`]s. All text is encoded with special
//! tokens as plain characters, exactly as when the tuned model is asked later: the prompt as a conversation that ends with
//! the opening of the answer, the response by itself, then the token that ends it.

use super::examples::Example;
use crate::error::{Error, Result};
use crate::llm::chat::{ChatTokenizer, Message};

/// Makes examples of texts.
pub struct Encoder<'a> {
    chat: &'a ChatTokenizer,
    end: u32,
    max_tokens: usize,
}

impl<'a> Encoder<'a> {
    /// For examples of at most `max_tokens` tokens.
    ///
    /// # Errors
    /// The model has no chat template, or names no token that ends an answer (exit 65).
    pub fn new(chat: &'a ChatTokenizer, max_tokens: usize) -> Result<Self> {
        let said = chat.encode_conversation(&[Message::new("user", "?"), Message::new("assistant", "!")], false)?;
        let ends = chat.end_of_text();
        let end = said.iter().rev().find(|id| ends.contains(id)).or(ends.first()).copied().ok_or_else(|| {
            Error::data("the model names no token that ends an answer")
                .with_help("set `eos_token_id` in its config.json")
        })?;
        Ok(Encoder { chat, end, max_tokens: max_tokens.min(chat.context_length()) })
    }

    fn prompt(&self, system: &str, prompt: &str) -> Result<Vec<u32>> {
        let system = (!system.is_empty()).then(|| Message::new("system", system));
        let messages: Vec<Message> = system.into_iter().chain([Message::new("user", prompt)]).collect();
        self.chat.encode_chat(&messages)
    }

    /// An instruction, of which the response is learned, its end too; `None` where it is too long.
    ///
    /// # Errors
    /// The chat template refuses the messages (exit 65).
    pub fn instruction(&self, system: &str, prompt: &str, response: &str) -> Result<Option<Example>> {
        let prompt = self.prompt(system, prompt)?;
        let mut response = self.chat.encode_text(response);
        response.push(self.end);
        let example = Example::response(&prompt, &response);
        Ok((example.ids.len() <= self.max_tokens).then_some(example))
    }

    /// A list of titles, oldest first, one a line, as the answer to `prompt`: every title but the first is learned. A list that is
    /// too long is cut into several, each with a first title of its own; titles that don't fit alone are left out.
    ///
    /// # Errors
    /// The chat template refuses the prompt (exit 65).
    pub fn titles(&self, prompt: &str, titles: &[&str]) -> Result<Vec<Example>> {
        let start = self.prompt("", prompt)?;
        let room = self.max_tokens.saturating_sub(start.len() + 1);
        let mut lists: Vec<Vec<Vec<u32>>> = Vec::new();
        let mut used = room + 1;
        for title in titles {
            // A title is one line, whatever it holds.
            let line = title.split_whitespace().collect::<Vec<_>>().join(" ");
            let ids = self.chat.encode_text(&format!("{line}\n"));
            if ids.len() > room {
                continue;
            }
            if used + ids.len() > room {
                lists.push(Vec::new());
                used = 0;
            }
            used += ids.len();
            lists.last_mut().expect("a list was just begun").push(ids);
        }
        let example = |list: &Vec<Vec<u32>>| {
            let first = start.len() + list[0].len();
            let ids = [start.clone(), list.concat(), vec![self.end]].concat();
            Example { learned: (0..ids.len()).map(|n| n >= first).collect(), ids }
        };
        Ok(lists.iter().filter(|list| list.len() > 1).map(example).collect())
    }
}
