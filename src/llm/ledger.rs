//! The ledger: one row per answered prompt, so that no answer is paid for twice.
//!
//! In: answers, keyed by the digest of (prompt tokens, weights, mode, settings). Out: the
//! answers of earlier runs, also of runs that were killed. Rows are put in segments of a few
//! prompts, each a whole Parquet object ([`segments`]), so a kill loses at most the segment in work; many small
//! segments are merged into one. The second level, orders of shortlists that changed a little, is in [`orders`].

pub mod orders;
mod segments;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int32Array, ListArray, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Float32Type, Int32Type, TimeUnit, TimestampMicrosecondType};
use sha2::{Digest, Sha256};

use self::segments::Segments;
use crate::columns::{ANSWER, ANSWER_TOKENS, LLM_ASKED_AT, LLM_MODEL, MODE, PROMPT_DIGEST, SCORES, TOKENS};
use crate::error::Result;
use crate::tables::{Store, Table};

/// Folder of the ledger below the artifacts.
pub const LEDGER: &str = "ledger";
/// Bytes below which a segment is small.
const SMALL: u64 = 16 << 20;
/// Small segments that may be there before they are merged.
const COMPACT_ABOVE: usize = 64;

/// One answer of the LLM.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// Key; see [`digest`].
    pub prompt_digest: String,
    /// One score per candidate, in the order in which the prompt shows them: log-probabilities, or the negative place
    /// where the LLM wrote a list.
    pub scores: Vec<f32>,
    /// Tokens that the prompt and its continuations have.
    pub tokens: i32,
    /// Tokens that the LLM wrote.
    pub answer_tokens: i32,
    /// What it wrote, where that is text, cut.
    pub text: Option<String>,
    /// How it was read: the mode's name.
    pub mode: String,
    /// Microseconds since 1970, UTC.
    pub asked_at: i64,
}

/// Key of an answer: sha256 (hex) over the prompt's token ids, what is scored after it, the
/// digest of the weights, and mode and settings as text.
pub fn digest(prompt: &[u32], scored: &[Vec<u32>], weights: &str, mode: &str) -> String {
    let mut hasher = Sha256::new();
    hasher.update(weights.as_bytes());
    hasher.update([0]);
    hasher.update(mode.as_bytes());
    hasher.update([0]);
    for ids in std::iter::once(prompt).chain(scored.iter().map(Vec::as_slice)) {
        hasher.update((ids.len() as u64).to_le_bytes());
        for id in ids {
            hasher.update(id.to_le_bytes());
        }
    }
    hasher.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Folder of one set of weights.
fn folder_of(weights: &str) -> String {
    let plain = weights.len() >= 16 && weights.bytes().all(|b| b.is_ascii_hexdigit());
    match plain {
        true => weights[..16].to_owned(),
        // A name that a server gives its weights may hold anything.
        false => Sha256::digest(weights.as_bytes()).iter().take(8).map(|b| format!("{b:02x}")).collect(),
    }
}

/// All answers of one set of weights.
#[derive(Debug)]
pub struct Ledger {
    segments: Segments,
    weights: String,
    known: HashMap<String, Answer>,
    /// Keys that large segments hold.
    settled: HashSet<String>,
    small: Vec<String>,
}

impl Ledger {
    /// Opens the ledger of the weights with digest (or, behind a server, name) `weights` below `store`. A segment that
    /// cannot be read is skipped and counted: its prompts are asked again.
    ///
    /// # Errors
    /// Exit 75 where the store fails.
    pub async fn open(store: &Store, weights: &str) -> Result<(Self, usize)> {
        let segments = Segments::new(store.child(&format!("{LEDGER}/{}", folder_of(weights))), SMALL);
        let found = segments.read().await?;
        let mut unreadable = found.unreadable;
        let mut known = HashMap::new();
        let mut settled = HashSet::new();
        for (table, small) in &found.tables {
            match from_table(table) {
                Ok(answers) => {
                    if !small {
                        settled.extend(answers.iter().map(|a| a.prompt_digest.clone()));
                    }
                    known.extend(answers.into_iter().map(|a| (a.prompt_digest.clone(), a)));
                }
                Err(_) => unreadable += 1,
            }
        }
        // What cannot be read is not merged, so that nothing of it is lost.
        let small = if unreadable == found.unreadable { found.small } else { Vec::new() };
        Ok((Ledger { segments, weights: weights.to_owned(), known, settled, small }, unreadable))
    }

    /// The answer under a key.
    pub fn get(&self, prompt_digest: &str) -> Option<&Answer> {
        self.known.get(prompt_digest)
    }

    /// Number of answers.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Adds answers as one segment. The segment's name comes from its keys, so writing the same
    /// answers twice leaves one copy.
    ///
    /// # Errors
    /// Exit 75 where the store fails.
    pub async fn append(&mut self, answers: Vec<Answer>) -> Result<()> {
        if answers.is_empty() {
            return Ok(());
        }
        let table = to_table(&answers, &self.weights)?;
        let file = self.segments.append(answers.iter().map(|a| a.prompt_digest.as_str()), &table).await?;
        self.small.retain(|f| *f != file);
        self.small.push(file);
        self.known.extend(answers.into_iter().map(|a| (a.prompt_digest.clone(), a)));
        Ok(())
    }

    /// Merges small segments into one where there are more than a few; returns how many were merged.
    ///
    /// A kill at any point loses nothing: the merged segment is there before the small ones go. So does another process
    /// that reads or appends at the same time: it looks again for what is gone, and only what this ledger has read is deleted.
    ///
    /// # Errors
    /// Exit 75 where the store fails.
    pub async fn compact(&mut self) -> Result<usize> {
        if self.small.len() <= COMPACT_ABOVE {
            return Ok(0);
        }
        let mut all: Vec<&Answer> = self.known.values().filter(|a| !self.settled.contains(&a.prompt_digest)).collect();
        all.sort_by(|a, b| (a.asked_at, &a.prompt_digest).cmp(&(b.asked_at, &b.prompt_digest)));
        let all: Vec<Answer> = all.into_iter().cloned().collect();
        let table = to_table(&all, &self.weights)?;
        let keys = all.iter().map(|a| a.prompt_digest.as_str());
        let new = self.segments.replace(&self.small, keys, &table).await?;
        let merged = std::mem::replace(&mut self.small, vec![new]).len();
        Ok(merged)
    }
}

fn to_table(answers: &[Answer], weights: &str) -> Result<Table> {
    let digests: ArrayRef = Arc::new(StringArray::from_iter_values(answers.iter().map(|a| &a.prompt_digest)));
    let scores: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>(
        answers.iter().map(|a| Some(a.scores.iter().map(|&s| Some(s)))),
    ));
    let numbers =
        |of: fn(&Answer) -> i32| -> ArrayRef { Arc::new(Int32Array::from_iter_values(answers.iter().map(of))) };
    let asked: ArrayRef =
        Arc::new(TimestampMicrosecondArray::from_iter_values(answers.iter().map(|a| a.asked_at)).with_timezone("UTC"));
    let texts: StringArray = answers.iter().map(|a| a.text.as_deref()).collect();
    Table::from_columns(vec![
        (PROMPT_DIGEST, digests, false),
        (SCORES, scores, false),
        (TOKENS, numbers(|a| a.tokens), false),
        (LLM_ASKED_AT, asked, false),
        (LLM_MODEL, Arc::new(StringArray::from(vec![weights; answers.len()])), false),
        (MODE, Arc::new(StringArray::from_iter_values(answers.iter().map(|a| &a.mode))), false),
        (ANSWER_TOKENS, numbers(|a| a.answer_tokens), false),
        (ANSWER, Arc::new(texts), true),
    ])
}

/// The rows of a segment; segments of earlier versions have the first four columns only.
fn from_table(table: &Table) -> Result<Vec<Answer>> {
    let digests = table.strings(PROMPT_DIGEST)?;
    let list_type = DataType::List(Arc::new(arrow::datatypes::Field::new_list_field(DataType::Float32, true)));
    let scores = table.column_as(SCORES, &list_type)?;
    let scores = scores.as_list::<i32>();
    let tokens = table.column_as(TOKENS, &DataType::Int32)?;
    let tokens = tokens.as_primitive::<Int32Type>();
    let utc = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
    let asked = table.column_as(LLM_ASKED_AT, &utc)?;
    let asked = asked.as_primitive::<TimestampMicrosecondType>();
    let text = |name: &str| -> Result<Vec<Option<String>>> {
        if table.has(name) { table.strings(name) } else { Ok(vec![None; table.num_rows()]) }
    };
    let (modes, texts) = (text(MODE)?, text(ANSWER)?);
    let written = if table.has(ANSWER_TOKENS) { table.i32s(ANSWER_TOKENS)? } else { vec![0; table.num_rows()] };
    let mut answers = Vec::with_capacity(digests.len());
    for (row, prompt_digest) in digests.into_iter().enumerate() {
        let Some(prompt_digest) = prompt_digest else { continue };
        let row_scores = scores.value(row);
        answers.push(Answer {
            prompt_digest,
            scores: row_scores.as_primitive::<Float32Type>().values().to_vec(),
            tokens: tokens.value(row),
            answer_tokens: written[row],
            text: texts[row].clone(),
            mode: modes[row].clone().unwrap_or_default(),
            asked_at: if asked.is_null(row) { 0 } else { asked.value(row) },
        });
    }
    Ok(answers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(key: &str) -> Answer {
        let (scores, mode) = (vec![-0.5, -2.25], "label".into());
        let asked_at = 1_763_000_000_000_000;
        Answer { prompt_digest: key.into(), scores, tokens: 400, mode, asked_at, ..Answer::default() }
    }

    #[tokio::test]
    async fn answers_survive_and_are_written_once() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::local(folder.path()).unwrap();
        let weights = "0123456789abcdef0123";
        let (mut ledger, _) = Ledger::open(&store, weights).await.unwrap();
        ledger.append(vec![answer("a"), answer("b")]).await.unwrap();
        ledger.append(vec![answer("a"), answer("b")]).await.unwrap();
        assert_eq!(store.list("ledger").await.unwrap().len(), 1);

        let (again, unreadable) = Ledger::open(&store, weights).await.unwrap();
        assert_eq!((again.len(), unreadable), (2, 0));
        assert_eq!(again.get("a"), Some(&answer("a")));
        let (other, _) = Ledger::open(&store, "fedcba9876543210").await.unwrap();
        assert!(other.is_empty());
    }

    #[tokio::test]
    async fn a_torn_segment_is_skipped_and_counted() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::local(folder.path()).unwrap();
        let (mut ledger, _) = Ledger::open(&store, "w").await.unwrap();
        ledger.append(vec![answer("a")]).await.unwrap();
        store
            .put(&format!("ledger/{}/torn.parquet", folder_of("w")), bytes::Bytes::from_static(b"PAR1"))
            .await
            .unwrap();
        let (again, unreadable) = Ledger::open(&store, "w").await.unwrap();
        assert_eq!((again.len(), unreadable), (1, 1));
    }

    #[test]
    fn the_key_depends_on_everything() {
        let base = digest(&[1, 2], &[vec![3]], "w", "label");
        for other in [
            digest(&[1], &[vec![2, 3]], "w", "label"),
            digest(&[1, 2], &[vec![3], vec![]], "w", "label"),
            digest(&[1, 2], &[vec![3]], "v", "label"),
            digest(&[1, 2], &[vec![3]], "w", "likelihood"),
        ] {
            assert_ne!(base, other);
        }
    }

    #[tokio::test]
    async fn many_small_segments_become_one() {
        let place = tempfile::tempdir().unwrap();
        let store = Store::local(place.path()).unwrap();
        let (mut ledger, _) = Ledger::open(&store, "w").await.unwrap();
        for n in 0..=COMPACT_ABOVE {
            assert_eq!(ledger.compact().await.unwrap(), 0);
            ledger.append(vec![answer(&format!("{n}")), answer("shared")]).await.unwrap();
        }
        // A reader that has listed the small ones, and opens them after they are gone.
        let files = store.list("ledger").await.unwrap();
        assert_eq!(files.len(), COMPACT_ABOVE + 1);
        assert_eq!(ledger.compact().await.unwrap(), COMPACT_ABOVE + 1);
        assert_eq!(store.list("ledger").await.unwrap().len(), 1);
        let (again, unreadable) = Ledger::open(&store, "w").await.unwrap();
        assert_eq!((again.len(), unreadable), (COMPACT_ABOVE + 2, 0));
        assert_eq!(again.get("7"), Some(&answer("7")));
    }

    #[tokio::test]
    async fn a_kill_between_putting_and_deleting_loses_nothing() {
        let place = tempfile::tempdir().unwrap();
        let store = Store::local(place.path()).unwrap();
        let (mut ledger, _) = Ledger::open(&store, "w").await.unwrap();
        for n in 0..=COMPACT_ABOVE {
            ledger.append(vec![answer(&format!("{n}"))]).await.unwrap();
        }
        let folder = store.child(&format!("ledger/{}", folder_of("w")));
        let mut before = Vec::new();
        for object in folder.list("").await.unwrap() {
            let file = object.location.filename().unwrap().to_owned();
            before.push((file.clone(), folder.get(&file).await.unwrap()));
        }
        ledger.compact().await.unwrap();
        // As if the process had died after some of the deletions: the rest is still there.
        for (file, bytes) in before.into_iter().skip(9) {
            folder.put(&file, bytes).await.unwrap();
        }
        let (mut again, unreadable) = Ledger::open(&store, "w").await.unwrap();
        assert_eq!((again.len(), unreadable), (COMPACT_ABOVE + 1, 0));
        again.append(vec![answer("more")]).await.unwrap();
        again.append(vec![answer("most")]).await.unwrap();
        // It is put right by the next one.
        for n in 0..COMPACT_ABOVE {
            again.append(vec![answer(&format!("x{n}"))]).await.unwrap();
        }
        again.compact().await.unwrap();
        assert_eq!(store.list("ledger").await.unwrap().len(), 1);
        assert_eq!(Ledger::open(&store, "w").await.unwrap().0.len(), 2 * COMPACT_ABOVE + 3);
    }

    #[tokio::test]
    async fn readers_and_writers_beside_a_merge_lose_nothing() {
        let place = tempfile::tempdir().unwrap();
        let store = Store::local(place.path()).unwrap();
        let writer = async {
            let (mut ledger, _) = Ledger::open(&store, "w").await.unwrap();
            for n in 0..3 * COMPACT_ABOVE {
                ledger.append(vec![answer(&format!("{n}"))]).await.unwrap();
                ledger.compact().await.unwrap();
            }
        };
        let other = async {
            let mut last = 0;
            for n in 0..40 {
                let (mut ledger, unreadable) = Ledger::open(&store, "w").await.unwrap();
                assert_eq!(unreadable, 0);
                assert!(ledger.len() >= last, "{} answers, and there were {last}", ledger.len());
                last = ledger.len() + 1;
                ledger.append(vec![answer(&format!("other{n}"))]).await.unwrap();
            }
        };
        tokio::join!(writer, other);
        assert_eq!(Ledger::open(&store, "w").await.unwrap().0.len(), 3 * COMPACT_ABOVE + 40);
    }
}
