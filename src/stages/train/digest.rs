//! The sha256 of what a model learns from: it names checkpoints and kept fits, and stands in the model's card.
//!
//! In: [`TrainData`]. Out: hex digits.

use sha2::{Digest, Sha256};

use super::data::{FitOn, Log, RatedRows, TrainData};
use super::savings::hex;
use crate::interactions::Histories;
use crate::interactions::fields::Values;

impl TrainData {
    /// sha256 (hex) of what the weights are fitted on: sizes, histories, ratings, fields.
    pub fn fingerprint(&self, on: FitOn) -> String {
        let mut hash = Hash(Sha256::new());
        hash.number(self.users.len());
        hash.number(self.items.len());
        match (&self.log, on) {
            (Log::Ranking(log), FitOn::Train) => hash.histories(&log.train),
            (Log::Ranking(log), FitOn::TrainAndValid) => hash.histories(&log.both),
            (Log::Rating(log), on) => {
                // A struct of numbers and strings is JSON, and the same one the same text.
                hash.bytes(serde_json::to_string(&log.fields).unwrap_or_default().as_bytes());
                hash.values(&log.users.values);
                hash.values(&log.items.values);
                hash.rated(if on == FitOn::Train { &log.train } else { &log.both });
            }
        }
        hash.hex()
    }

    /// sha256 (hex) of all that a fit can depend on: [`TrainData::fingerprint`] and, where weights are fitted on
    /// train, the held-out interactions that decide when to stop.
    pub fn fit_fingerprint(&self, on: FitOn) -> String {
        let mut hash = Hash(Sha256::new());
        hash.bytes(self.fingerprint(on).as_bytes());
        match (&self.log, on) {
            (_, FitOn::TrainAndValid) => {}
            (Log::Ranking(log), FitOn::Train) => {
                log.valid.iter().for_each(|&(u, i)| {
                    hash.number(u as usize);
                    hash.number(i as usize);
                });
            }
            (Log::Rating(log), FitOn::Train) => hash.rated(&log.valid),
        }
        hash.hex()
    }
}

struct Hash(Sha256);

impl Hash {
    fn number(&mut self, n: usize) {
        self.0.update((n as u64).to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len());
        self.0.update(bytes);
    }

    fn u32s(&mut self, values: &[u32]) {
        self.number(values.len());
        values.iter().for_each(|v| self.0.update(v.to_le_bytes()));
    }

    fn f32s(&mut self, values: &[f32]) {
        self.number(values.len());
        values.iter().for_each(|v| self.0.update(v.to_le_bytes()));
    }

    fn histories(&mut self, histories: &Histories) {
        histories.offsets().iter().for_each(|&n| self.number(n));
        self.u32s(histories.items());
    }

    fn values(&mut self, values: &[Values]) {
        for column in values {
            match column {
                Values::Single(v) => self.u32s(v),
                Values::Multi { offsets, values } => {
                    self.u32s(offsets);
                    self.u32s(values);
                }
                Values::Dense(v) => self.f32s(v),
            }
        }
    }

    fn rated(&mut self, rated: &RatedRows) {
        self.u32s(&rated.rows.user);
        self.u32s(&rated.rows.item);
        self.values(&rated.rows.values);
        self.f32s(&rated.ratings);
    }

    fn hex(self) -> String {
        hex(self.0.finalize().as_slice())
    }
}
