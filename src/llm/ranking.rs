//! Greedy listwise ranking: the model writes the list, and may write nothing but candidates that are left.
//!
//! In: prompts and candidates as token ids. Out: the order in which the model writes them. This is the paper's inference
//! (arXiv 2401.13870, section 4.4: the LLM writes the ranked list, greedily), except that the text is constrained
//! by a [`Trie`] at every token, so there is nothing to parse, match or repair.

use super::chat::ChatTokenizer;
use super::decoder::Wanted;
use super::scheduler::{More, Plan};
use super::scoring::{argmax, normalizer};
use super::trie::{Next, Trie};
use crate::error::Result;

/// A prompt and the candidates that are ranked after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankRequest {
    /// Token ids, at least 1.
    pub prompt: Vec<u32>,
    /// Token ids of each candidate as it is written, its terminator included (the end of the line): so "Alien" can be told
    /// from the beginning of "Aliens". Equal candidates keep the order given here.
    pub candidates: Vec<Vec<u32>>,
    /// Token ids that are written before the first, second, ... candidate, such as its number; none where this is shorter.
    pub leads: Vec<Vec<u32>>,
}

/// How a list is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ListFormat {
    /// One title on each line.
    #[default]
    Lines,
    /// `1. Title`, one on each line.
    Numbered,
}

impl RankRequest {
    /// Candidates by their titles, written as `format` says. Special tokens in a title are plain text.
    pub fn new(chat: &ChatTokenizer, prompt: Vec<u32>, titles: &[&str], format: ListFormat) -> Self {
        let line = |title: &&str| match format {
            ListFormat::Lines => chat.encode_text(&format!("{title}\n")),
            // The space belongs to the title: byte-level vocabularies have words with the space before them.
            ListFormat::Numbered => chat.encode_text(&format!(" {title}\n")),
        };
        let leads = match format {
            ListFormat::Lines => Vec::new(),
            ListFormat::Numbered => (1..=titles.len()).map(|n| chat.encode_text(&format!("{n}."))).collect(),
        };
        RankRequest { prompt, candidates: titles.iter().map(line).collect(), leads }
    }

    /// Tokens that are written at most.
    pub fn written(&self) -> usize {
        self.candidates.iter().map(Vec::len).sum::<usize>()
            + self.leads.iter().take(self.candidates.len()).map(Vec::len).sum::<usize>()
    }
}

/// A list that the model wrote.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ranked {
    /// Every candidate once, best first.
    pub order: Vec<usize>,
    /// Log-probability of each as it was written, in the same order: of its tokens among those that were allowed.
    /// The last one has 0: nothing else was left.
    pub logprobs: Vec<f64>,
}

/// The list of one request.
pub(super) struct Writer {
    trie: Trie,
    leads: Vec<Vec<u32>>,
    ranked: Ranked,
    /// Log-probability of the candidate that is being written.
    logprob: f64,
    /// What may be written next.
    allowed: Vec<u32>,
}

impl Writer {
    pub(super) fn new(request: &RankRequest) -> Self {
        let trie = Trie::new(request.candidates.iter().map(Vec::as_slice));
        Writer { trie, leads: request.leads.clone(), ranked: Ranked::default(), logprob: 0.0, allowed: Vec::new() }
    }

    /// The tokens up to the next choice, and the choice; `None` when the list is complete.
    pub(super) fn next_choice(&mut self) -> Option<(Vec<u32>, Vec<u32>)> {
        let mut ids = Vec::new();
        if self.ranked.order.is_empty() && self.allowed.is_empty() {
            ids.extend(self.leads.first().into_iter().flatten());
        }
        loop {
            match self.trie.next() {
                Next::Empty => return None,
                Next::Forced(token) => {
                    self.trie.write(token);
                    ids.push(token);
                }
                Next::Complete(candidate) => {
                    self.trie.take();
                    self.ranked.order.push(candidate);
                    self.ranked.logprobs.push(std::mem::take(&mut self.logprob));
                    ids.extend(self.leads.get(self.ranked.order.len()).into_iter().flatten());
                }
                Next::Choice(allowed) => {
                    self.allowed.clone_from(&allowed);
                    return Some((ids, allowed));
                }
            }
        }
    }

    /// Takes the likeliest of the allowed tokens, given their logits; the smallest id of equal ones.
    pub(super) fn choose(&mut self, logits: &[f32]) -> u32 {
        let best = argmax(logits) as usize;
        self.logprob += f64::from(logits[best]) - normalizer(logits);
        let token = self.allowed[best];
        self.trie.write(token);
        token
    }

    pub(super) fn finish(self) -> Ranked {
        self.ranked
    }
}

/// Writes the lists of many requests at the same time.
pub(super) struct Ranking<'a> {
    /// Per job.
    pub(super) writers: Vec<Writer>,
    /// The token that was chosen last, per job.
    pub(super) chosen: Vec<Option<u32>>,
    pub(super) progress: &'a mut dyn FnMut(usize) -> Result<()>,
}

impl Plan for Ranking<'_> {
    fn read(&mut self, job: usize, _: usize, values: &[f32]) {
        self.chosen[job] = Some(self.writers[job].choose(values));
    }

    fn next(&mut self, job: usize) -> Option<More> {
        let mut ids = vec![self.chosen[job].take()?];
        let (forced, allowed) = self.writers[job].next_choice()?;
        ids.extend(forced);
        Some(More { ids, wanted: Wanted::Logits(allowed) })
    }

    fn done(&mut self, _: usize) -> Result<()> {
        (self.progress)(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A writer without a model: `prefer` is taken wherever it is allowed, else the first allowed token.
    fn write(request: &RankRequest, prefer: &[u32]) -> (Vec<u32>, Ranked) {
        let mut writer = Writer::new(request);
        let mut text = Vec::new();
        while let Some((forced, allowed)) = writer.next_choice() {
            text.extend(forced);
            let logits: Vec<f32> = allowed.iter().map(|a| if prefer.contains(a) { 1.0 } else { 0.0 }).collect();
            text.push(writer.choose(&logits));
        }
        (text, writer.finish())
    }

    #[test]
    fn numbers_are_written_and_titles_are_chosen() {
        let request = RankRequest {
            prompt: vec![1],
            candidates: vec![vec![5, 0], vec![6, 7, 0], vec![6, 8, 0]],
            leads: vec![vec![91], vec![92], vec![93]],
        };
        let (text, ranked) = write(&request, &[6, 8]);
        // What follows the last choice is not computed.
        assert_eq!(text, [91, 6, 8, 0, 92, 6]);
        assert_eq!(ranked.order, [2, 1, 0]);
        assert_eq!(ranked.logprobs[2], 0.0);
        let two = 1.0 - (1f64.exp() + 1.0).ln();
        assert!((ranked.logprobs[0] - 2.0 * two).abs() < 1e-6, "{ranked:?}");
        assert!((ranked.logprobs[1] - two).abs() < 1e-6);
        assert_eq!(request.written(), 11);
    }

    #[test]
    fn a_list_without_choices_needs_no_model() {
        let same = RankRequest { prompt: vec![1], candidates: vec![vec![5, 0]; 3], leads: vec![] };
        let (text, ranked) = write(&same, &[]);
        assert!(text.is_empty());
        assert_eq!((ranked.order, ranked.logprobs), (vec![0, 1, 2], vec![0.0; 3]));
    }
}
