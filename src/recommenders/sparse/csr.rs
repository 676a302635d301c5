//! Compressed sparse rows on the host.

use crate::error::{Error, Result};

/// A sparse matrix in compressed rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Csr {
    rows: usize,
    cols: usize,
    /// `[rows + 1]`: where each row's entries begin.
    offsets: Vec<usize>,
    /// `[nonzeros]`: columns, ascending within a row.
    columns: Vec<u32>,
    /// `[nonzeros]`.
    values: Vec<f32>,
    /// Row ranges of similar work, the units that threads take; `[blocks + 1]` first rows.
    blocks: Vec<usize>,
}

/// Entries per unit of parallel work: large enough that handing it out costs little.
const BLOCK_ENTRIES: usize = 4096;

impl Csr {
    /// From entries in any order; entries of one place are added up (in the order given).
    ///
    /// # Errors
    /// An entry outside `[rows, cols]` (our bug: indices come from an `IdMap`).
    pub fn from_entries(rows: usize, cols: usize, entries: &[(u32, u32, f32)]) -> Result<Csr> {
        if let Some(&(r, c, _)) = entries.iter().find(|e| e.0 as usize >= rows || e.1 as usize >= cols) {
            return Err(Error::internal(format!("entry ({r}, {c}) lies outside a {rows} x {cols} matrix")));
        }
        let mut sorted: Vec<(u32, u32, f32)> = entries.to_vec();
        sorted.sort_by_key(|&(r, c, _)| (r, c));
        let mut offsets = vec![0usize; rows + 1];
        let (mut columns, mut values) = (Vec::with_capacity(sorted.len()), Vec::<f32>::with_capacity(sorted.len()));
        let mut last = None;
        for (r, c, v) in sorted {
            if last == Some((r, c)) {
                *values.last_mut().expect("a repeated entry follows its first one") += v;
                continue;
            }
            last = Some((r, c));
            columns.push(c);
            values.push(v);
            offsets[r as usize + 1] += 1;
        }
        for r in 0..rows {
            offsets[r + 1] += offsets[r];
        }
        Ok(Csr::from_parts(rows, cols, offsets, columns, values))
    }

    /// From compressed rows: row `r` has `columns[offsets[r]..offsets[r + 1]]`, ascending and distinct.
    ///
    /// # Panics
    /// When the parts do not fit together (our bug).
    pub fn from_rows(cols: usize, offsets: Vec<usize>, columns: Vec<u32>, values: Vec<f32>) -> Csr {
        assert!(offsets.first() == Some(&0) && offsets.last() == Some(&columns.len()), "offsets cover the columns");
        assert!(offsets.is_sorted() && columns.len() == values.len(), "one value a column");
        assert!(columns.iter().all(|&c| (c as usize) < cols), "columns are below {cols}");
        debug_assert!(offsets.windows(2).all(|r| columns[r[0]..r[1]].is_sorted()));
        Csr::from_parts(offsets.len() - 1, cols, offsets, columns, values)
    }

    /// From the three arrays themselves: `offsets [rows + 1]`, and `columns [nonzeros]`, distinct and ascending within
    /// a row, with their `values [nonzeros]`.
    pub(in crate::recommenders) fn from_parts(
        rows: usize,
        cols: usize,
        offsets: Vec<usize>,
        columns: Vec<u32>,
        values: Vec<f32>,
    ) -> Csr {
        let mut blocks = vec![0];
        let mut first = 0;
        for row in 0..rows {
            // An empty row is work too: its zeros have to be written.
            if offsets[row + 1] - offsets[first] + (row + 1 - first) >= BLOCK_ENTRIES {
                first = row + 1;
                blocks.push(first);
            }
        }
        if first < rows {
            blocks.push(rows);
        }
        Csr { rows, cols, offsets, columns, values, blocks }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number of stored entries.
    pub fn nonzeros(&self) -> usize {
        self.columns.len()
    }

    /// Columns and values of one row.
    pub fn row(&self, row: usize) -> (&[u32], &[f32]) {
        let range = self.offsets[row]..self.offsets[row + 1];
        (&self.columns[range.clone()], &self.values[range])
    }

    /// The transpose `[cols, rows]`.
    pub fn transpose(&self) -> Csr {
        let mut offsets = vec![0usize; self.cols + 1];
        for &c in &self.columns {
            offsets[c as usize + 1] += 1;
        }
        for c in 0..self.cols {
            offsets[c + 1] += offsets[c];
        }
        let mut next = offsets.clone();
        let (mut columns, mut values) = (vec![0u32; self.nonzeros()], vec![0f32; self.nonzeros()]);
        for r in 0..self.rows {
            let (cs, vs) = self.row(r);
            for (&c, &v) in cs.iter().zip(vs) {
                let at = next[c as usize];
                (columns[at], values[at]) = (r as u32, v);
                next[c as usize] += 1;
            }
        }
        Csr::from_parts(self.cols, self.rows, offsets, columns, values)
    }

    /// Row ranges of similar work that cover all rows in order.
    pub(super) fn blocks(&self) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
        self.blocks.windows(2).map(|w| w[0]..w[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Csr {
        // 3 x 4: row 1 is empty, (2, 3) is given twice.
        Csr::from_entries(3, 4, &[(2, 3, 1.5), (0, 1, 2.0), (2, 0, -1.0), (0, 0, 4.0), (2, 3, 0.5)]).unwrap()
    }

    #[test]
    fn entries_are_sorted_and_repeats_added() {
        let m = small();
        assert_eq!((m.rows(), m.cols(), m.nonzeros()), (3, 4, 4));
        assert_eq!(m.row(0), (&[0u32, 1][..], &[4.0f32, 2.0][..]));
        assert_eq!(m.row(1), (&[][..], &[][..]));
        assert_eq!(m.row(2), (&[0u32, 3][..], &[-1.0f32, 2.0][..]));
    }

    #[test]
    fn transposing_twice_gives_the_same_matrix() {
        let m = small();
        let t = m.transpose();
        assert_eq!((t.rows(), t.cols()), (4, 3));
        assert_eq!(t.row(0), (&[0u32, 2][..], &[4.0f32, -1.0][..]));
        assert_eq!(t.transpose(), m);
    }

    #[test]
    fn an_entry_outside_is_our_bug() {
        assert_eq!(Csr::from_entries(2, 2, &[(0, 2, 1.0)]).unwrap_err().fault.exit_code(), 70);
    }

    #[test]
    fn blocks_cover_all_rows_once() {
        let entries: Vec<(u32, u32, f32)> = (0..30_000u32).map(|n| (n / 600, n % 600, 1.0)).collect();
        let m = Csr::from_entries(60, 900, &entries).unwrap();
        let blocks: Vec<_> = m.blocks().collect();
        assert!(blocks.len() > 2, "{blocks:?}");
        assert_eq!(blocks.iter().flat_map(Clone::clone).collect::<Vec<_>>(), (0..60).collect::<Vec<_>>());
        assert_eq!(Csr::from_entries(0, 5, &[]).unwrap().blocks().count(), 0);
    }
}
