//! The ledger: one row per answered prompt, so that no answer is paid for twice.
//!
//! In: answers, keyed by the digest of (prompt tokens, weights, mode, settings). Out: the
//! answers of earlier runs, also of runs that were killed. Rows are put in segments of a few
//! prompts, each a whole Parquet object, so a kill loses at most the segment in work.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int32Array, ListArray, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Float32Type, Int32Type, TimeUnit, TimestampMicrosecondType};
use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::tables::{Store, StoredTable, Table};

/// One answer of the LLM.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Key; see [`digest`].
    pub prompt_digest: String,
    /// One score per candidate, in the order in which the prompt shows them: log-probabilities.
    pub scores: Vec<f32>,
    /// Tokens that the prompt and its continuations have.
    pub tokens: i32,
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

/// All answers of one set of weights.
#[derive(Debug)]
pub struct Ledger {
    store: Store,
    known: HashMap<String, Answer>,
}

impl Ledger {
    /// Opens the ledger of the weights with digest `weights` below `store`. A segment that
    /// cannot be read is skipped and counted: its prompts are asked again.
    pub async fn open(store: &Store, weights: &str) -> Result<(Self, usize)> {
        let store = store.child(&format!("ledger/{}", &weights[..weights.len().min(16)]));
        let mut known = HashMap::new();
        let mut unreadable = 0;
        for object in store.list("").await? {
            let Some(file) = object.location.filename().filter(|f| f.ends_with(".parquet")) else { continue };
            match read_segment(&store, file).await {
                Ok(answers) => known.extend(answers.into_iter().map(|a| (a.prompt_digest.clone(), a))),
                Err(_) => unreadable += 1,
            }
        }
        Ok((Ledger { store, known }, unreadable))
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
    pub async fn append(&mut self, answers: Vec<Answer>) -> Result<()> {
        if answers.is_empty() {
            return Ok(());
        }
        let mut hasher = Sha256::new();
        answers.iter().for_each(|a| hasher.update(a.prompt_digest.as_bytes()));
        let name: String = hasher.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect();
        StoredTable::write(&self.store, &format!("{name}.parquet"), &to_table(&answers)?).await?;
        self.known.extend(answers.into_iter().map(|a| (a.prompt_digest.clone(), a)));
        Ok(())
    }
}

fn to_table(answers: &[Answer]) -> Result<Table> {
    let digests: ArrayRef = Arc::new(StringArray::from_iter_values(answers.iter().map(|a| &a.prompt_digest)));
    let scores: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>(
        answers.iter().map(|a| Some(a.scores.iter().map(|&s| Some(s)))),
    ));
    let tokens: ArrayRef = Arc::new(Int32Array::from_iter_values(answers.iter().map(|a| a.tokens)));
    let asked: ArrayRef =
        Arc::new(TimestampMicrosecondArray::from_iter_values(answers.iter().map(|a| a.asked_at)).with_timezone("UTC"));
    Table::from_columns(vec![
        (crate::columns::PROMPT_DIGEST, digests, false),
        ("scores", scores, false),
        ("tokens", tokens, false),
        (crate::columns::LLM_ASKED_AT, asked, false),
    ])
}

async fn read_segment(store: &Store, file: &str) -> Result<Vec<Answer>> {
    let table = StoredTable::open(store, file).await?.collect().await?;
    let digests = table.strings(crate::columns::PROMPT_DIGEST)?;
    let list_type = DataType::List(Arc::new(arrow::datatypes::Field::new_list_field(DataType::Float32, true)));
    let scores = table.column_as("scores", &list_type)?;
    let scores = scores.as_list::<i32>();
    let tokens = table.column_as("tokens", &DataType::Int32)?;
    let tokens = tokens.as_primitive::<Int32Type>();
    let utc = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
    let asked = table.column_as(crate::columns::LLM_ASKED_AT, &utc)?;
    let asked = asked.as_primitive::<TimestampMicrosecondType>();
    let mut answers = Vec::with_capacity(digests.len());
    for (row, prompt_digest) in digests.into_iter().enumerate() {
        let Some(prompt_digest) = prompt_digest else { continue };
        let row_scores = scores.value(row);
        answers.push(Answer {
            prompt_digest,
            scores: row_scores.as_primitive::<Float32Type>().values().to_vec(),
            tokens: tokens.value(row),
            asked_at: if asked.is_null(row) { 0 } else { asked.value(row) },
        });
    }
    Ok(answers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(key: &str) -> Answer {
        Answer { prompt_digest: key.into(), scores: vec![-0.5, -2.25], tokens: 400, asked_at: 1_763_000_000_000_000 }
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
        store.put("ledger/w/torn.parquet", bytes::Bytes::from_static(b"PAR1")).await.unwrap();
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
}
