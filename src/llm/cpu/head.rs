//! What is read of a pass: logits of all ids or of some, log-probabilities, hidden states.
//!
//! In: hidden rows after the last norm, and what is wanted of each. Out: numbers. The head has a fifth of a small model's
//! weights, so it is multiplied by what is wanted only; a logit has the same bits whether others are made beside it or not.

use rayon::prelude::*;

use super::CpuModel;
use super::kernels::{self, Isa, LANES};
use crate::llm::decoder::Wanted;
use crate::llm::pack::Read;

/// Rows of logits that are made at once.
pub(super) const ROWS: usize = 56;

impl CpuModel {
    /// What is wanted of the read rows, given their hidden states `[reads, hidden]` after the last norm.
    pub(super) fn answer(&self, hidden: &[f32], reads: &[Read], each: &mut dyn FnMut(usize, &[f32])) {
        let width = self.config.hidden;
        let of = |r: usize| &hidden[r * width..(r + 1) * width];
        let (mut whole, mut some) = (Vec::new(), Vec::new());
        for (r, read) in reads.iter().enumerate() {
            match &read.wanted {
                Wanted::Hidden => each(r, of(r)),
                Wanted::Logits(ids) => some.push((r, ids)),
                Wanted::Vocabulary | Wanted::LogProbs(_) => whole.push(r),
            }
        }
        for part in some.chunks(ROWS) {
            let logits: Vec<Vec<f32>> = part.par_iter().map(|(r, ids)| self.logits_of(of(*r), ids)).collect();
            part.iter().zip(&logits).for_each(|((r, _), logits)| each(*r, logits));
        }
        let mut rows = Vec::new();
        for part in whole.chunks(ROWS) {
            rows.clear();
            part.iter().for_each(|r| rows.extend_from_slice(of(*r)));
            self.logits(&rows, &mut |i, logits| match &reads[part[i]].wanted {
                Wanted::LogProbs(ids) => each(part[i], &log_probabilities(self.isa, logits, ids)),
                _ => each(part[i], logits),
            });
        }
    }

    /// Logits of some ids, ascending, of one hidden row `[hidden]`: the same bits as among all of them.
    fn logits_of(&self, hidden: &[f32], ids: &[u32]) -> Vec<f32> {
        let mut out = Vec::with_capacity(ids.len());
        let mut columns = [0f32; LANES];
        for panel in ids.chunk_by(|a, b| *a as usize / LANES == *b as usize / LANES) {
            let at = panel[0] as usize / LANES;
            self.head.multiply_panels(self.isa, hidden, at..at + 1, &mut columns);
            out.extend(panel.iter().map(|id| columns[*id as usize % LANES]));
        }
        out
    }

    /// Logits of at most `ROWS` hidden rows, `each` called with the index of the row and `[vocab]`.
    fn logits(&self, hidden: &[f32], each: &mut dyn FnMut(usize, &[f32])) {
        let (width, vocab) = (self.config.hidden, self.config.vocab_size);
        let panels = self.head.panels();
        let threads = rayon::current_num_threads().max(1);
        // A few stretches of the vocabulary per thread; each is a product of its own.
        let stretch = panels.div_ceil(4 * threads).max(1);
        let n = hidden.len() / width;
        // Stretch by stretch in memory: `[stretches][n][columns of the stretch]`.
        let mut logits = vec![0f32; n * panels * LANES];
        let mut row = vec![0f32; panels * LANES];
        logits.par_chunks_mut(n * stretch * LANES).enumerate().for_each(|(s, out)| {
            let first = s * stretch;
            self.head.multiply_panels(self.isa, hidden, first..(first + stretch).min(panels), out);
        });
        for r in 0..n {
            for (s, part) in logits.chunks(n * stretch * LANES).enumerate() {
                let columns = part.len() / n;
                let at = s * stretch * LANES;
                row[at..at + columns].copy_from_slice(&part[r * columns..(r + 1) * columns]);
            }
            each(r, &row[..vocab]);
        }
    }
}

/// Log-probabilities of ids, given the logits of the vocabulary.
fn log_probabilities(isa: Isa, logits: &[f32], ids: &[u32]) -> Vec<f32> {
    let normalizer = kernels::log_sum_exp(isa, logits);
    ids.iter().map(|id| (f64::from(logits[*id as usize]) - normalizer) as f32).collect()
}
