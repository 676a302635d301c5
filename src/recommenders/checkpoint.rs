//! The state of a fit between two epochs, as files.
//!
//! In: a [`Checkpoint`]. Out: `checkpoint.json` (the log and the best epoch so far) and
//! `checkpoint.safetensors` (weights and optimizer under `state.`, the best model under `best.`), and back.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Epoch;
use super::saved::{NamedTensor, read_f32, write_f32};
use crate::error::{Error, Result};

const FILES: StateFiles = StateFiles { log: "checkpoint.json", tensors: "checkpoint.safetensors", version: 1 };

/// The two files of a state between two steps of a fit: a log as JSON, and tensors, those of the state under `state.` and
/// those of the best model so far under `best.`.
#[derive(Clone, Copy, Debug)]
pub struct StateFiles {
    /// Name of the log.
    pub log: &'static str,
    /// Name of the tensors' file.
    pub tensors: &'static str,
    /// Version of both; another one is not read.
    pub version: u32,
}

#[derive(Serialize, Deserialize)]
struct Versioned<L> {
    version: u32,
    #[serde(flatten)]
    log: L,
}

impl StateFiles {
    /// As files.
    ///
    /// # Errors
    /// Only our bugs.
    pub fn write<L: Serialize>(
        &self,
        log: L,
        state: &[NamedTensor],
        best: &[NamedTensor],
    ) -> Result<BTreeMap<String, Bytes>> {
        let json = serde_json::to_vec(&Versioned { version: self.version, log })
            .map_err(|e| Error::internal("a checkpoint is no JSON").because(e))?;
        let named = |prefix: &str, tensors: &[NamedTensor]| -> Vec<NamedTensor> {
            tensors.iter().map(|t| NamedTensor { name: format!("{prefix}.{}", t.name), ..t.clone() }).collect()
        };
        let all = [named("state", state), named("best", best)].concat();
        Ok(BTreeMap::from([
            (self.log.to_owned(), Bytes::from(json)),
            (self.tensors.to_owned(), Bytes::from(write_f32(&all)?)),
        ]))
    }

    /// The log, the state's tensors and the best model's.
    ///
    /// # Errors
    /// A file is missing, damaged or of another version (exit 65).
    pub fn read<L: DeserializeOwned>(
        &self,
        files: &BTreeMap<String, Bytes>,
    ) -> Result<(L, Vec<NamedTensor>, Vec<NamedTensor>)> {
        let file =
            |name: &str| files.get(name).ok_or_else(|| Error::data(format!("the checkpoint has no file `{name}`")));
        let Versioned { version, log } = serde_json::from_slice(file(self.log)?)
            .map_err(|e| Error::data(format!("`{}` cannot be read", self.log)).because(e))?;
        if version != self.version {
            return Err(Error::data(format!("`{}` has version {version}, {} is wanted", self.log, self.version)));
        }
        let (mut state, mut best) = (Vec::new(), Vec::new());
        for tensor in read_f32(file(self.tensors)?, self.tensors)? {
            let (to, name) = match tensor.name.split_once('.') {
                Some(("state", name)) => (&mut state, name.to_owned()),
                Some(("best", name)) => (&mut best, name.to_owned()),
                _ => return Err(Error::data(format!("`{}` has a tensor `{}`", self.tensors, tensor.name))),
            };
            to.push(NamedTensor { name, ..tensor });
        }
        Ok((log, state, best))
    }
}

/// All that the rest of a fit depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// The epochs so far.
    pub epochs: Vec<Epoch>,
    /// The best one by validation.
    pub best_epoch: usize,
    /// Its quality.
    pub best_quality: Option<f64>,
    /// Validations since.
    pub since: usize,
    /// The learner's state.
    pub state: Vec<NamedTensor>,
    /// The best model's tensors.
    pub best: Vec<NamedTensor>,
}

/// Numbers are kept as bits: a JSON reader may be off in the last digit, and a resumed fit must give the same bytes.
#[derive(Serialize, Deserialize)]
struct Log {
    epochs: Vec<LogLine>,
    best_epoch: usize,
    best_quality_bits: Option<u64>,
    since: usize,
}

#[derive(Serialize, Deserialize)]
struct LogLine {
    number: usize,
    loss_bits: u64,
    valid_bits: Option<u64>,
    seconds_bits: u64,
}

impl LogLine {
    fn of(epoch: &Epoch) -> Self {
        LogLine {
            number: epoch.number,
            loss_bits: epoch.loss.to_bits(),
            valid_bits: epoch.valid.map(f64::to_bits),
            seconds_bits: epoch.seconds.to_bits(),
        }
    }

    fn epoch(&self) -> Epoch {
        Epoch {
            number: self.number,
            loss: f64::from_bits(self.loss_bits),
            valid: self.valid_bits.map(f64::from_bits),
            seconds: f64::from_bits(self.seconds_bits),
        }
    }
}

impl Checkpoint {
    /// As files.
    ///
    /// # Errors
    /// Only our bugs.
    pub fn to_files(&self) -> Result<BTreeMap<String, Bytes>> {
        let log = Log {
            epochs: self.epochs.iter().map(LogLine::of).collect(),
            best_epoch: self.best_epoch,
            best_quality_bits: self.best_quality.map(f64::to_bits),
            since: self.since,
        };
        FILES.write(log, &self.state, &self.best)
    }

    /// From files.
    ///
    /// # Errors
    /// A file is missing, damaged or of another version (exit 65).
    pub fn from_files(files: &BTreeMap<String, Bytes>) -> Result<Self> {
        let (log, state, best): (Log, _, _) = FILES.read(files)?;
        Ok(Checkpoint {
            epochs: log.epochs.iter().map(LogLine::epoch).collect(),
            best_epoch: log.best_epoch,
            best_quality: log.best_quality_bits.map(f64::from_bits),
            since: log.since,
            state,
            best,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint() -> Checkpoint {
        Checkpoint {
            epochs: vec![
                Epoch { number: 1, loss: 0.7, valid: None, seconds: 0.1 },
                Epoch { number: 2, loss: 0.1 + 0.2, valid: Some(1.0 / 3.0), seconds: 0.1 },
            ],
            best_epoch: 2,
            best_quality: Some(1.0 / 3.0),
            since: 0,
            state: vec![NamedTensor::new("a.b", vec![2, 1], vec![1.5, f32::MIN_POSITIVE])],
            best: vec![NamedTensor::new("a", vec![0], vec![])],
        }
    }

    #[test]
    fn files_give_back_every_bit() {
        let files = checkpoint().to_files().unwrap();
        assert_eq!(Checkpoint::from_files(&files).unwrap(), checkpoint());
    }

    #[test]
    fn a_cut_file_is_refused() {
        let files = checkpoint().to_files().unwrap();
        for name in [FILES.log, FILES.tensors] {
            let mut cut = files.clone();
            cut.insert(name.to_owned(), files[name].slice(..files[name].len() / 2));
            assert_eq!(Checkpoint::from_files(&cut).unwrap_err().fault.exit_code(), 65);
        }
    }
}
