//! The GPU kernel of the sparse product, for whatever cubecl runs on.
//!
//! In: a [`Csr`], a dense matrix in a GPU's memory. Out: their product there.
//!
//! One thread makes one number of the result: the sum over its row's entries, in their order, with neighbouring threads
//! on neighbouring columns of the dense matrix. So that no thread has far more to do than the others (an
//! item that everybody has seen is a row with an entry per user), rows are cut into pieces of [`PIECE`] entries, and
//! a second product adds the pieces up. No atomics: the same bits each time.

use std::sync::Arc;

use cubecl::prelude::*;
use cubecl::server::Handle;
use cubecl::{CubeDim, calculate_cube_count_elemwise};

use crate::recommenders::sparse::Csr;

/// Entries of a row that one thread adds up.
const PIECE: usize = 256;

/// `out[row, d] = sum of values[k] * dense[columns[k], d]` over the entries of the row.
#[cube(launch_unchecked)]
fn rows_kernel(
    offsets: &Array<u32>,
    columns: &Array<u32>,
    values: &Array<f32>,
    dense: &Array<f32>,
    out: &mut Array<f32>,
    dim: usize,
) {
    if ABSOLUTE_POS >= out.len() {
        terminate!();
    }
    let row = ABSOLUTE_POS / dim;
    let d = ABSOLUTE_POS % dim;
    let first = offsets[row];
    let end = offsets[row + 1];
    let mut sum = 0.0f32;
    for k in first..end {
        let k = k as usize;
        sum += values[k] * dense[columns[k] as usize * dim + d];
    }
    out[ABSOLUTE_POS] = sum;
}

/// A sparse matrix in a GPU's memory, as products that follow one another.
#[derive(Clone, Debug)]
pub struct GpuCsr {
    cols: usize,
    levels: Arc<Vec<Level>>,
}

#[derive(Debug)]
struct Level {
    rows: usize,
    entries: usize,
    offsets: Handle,
    columns: Handle,
    values: Handle,
}

/// A level on the host.
#[derive(Debug, Default)]
struct HostLevel {
    offsets: Vec<u32>,
    columns: Vec<u32>,
    values: Vec<f32>,
}

/// The levels of a matrix: its entries in pieces, then the pieces of each row with weight 1, until a row is one piece.
fn levels(csr: &Csr) -> Vec<HostLevel> {
    let mut level = HostLevel { offsets: vec![0], ..HostLevel::default() };
    // Pieces of each row, as offsets.
    let mut row_pieces = vec![0usize];
    for row in 0..csr.rows() {
        let (columns, values) = csr.row(row);
        level.columns.extend_from_slice(columns);
        level.values.extend_from_slice(values);
        cut(&mut level.offsets, columns.len());
        row_pieces.push(level.offsets.len() - 1);
    }
    let mut all = vec![level];
    while row_pieces.len() - 1 < *row_pieces.last().expect("it begins with 0") {
        let pieces = *row_pieces.last().expect("it begins with 0");
        let mut level =
            HostLevel { offsets: vec![0], columns: (0..pieces as u32).collect(), values: vec![1.0; pieces] };
        let mut next = vec![0];
        for row in row_pieces.windows(2) {
            cut(&mut level.offsets, row[1] - row[0]);
            next.push(level.offsets.len() - 1);
        }
        all.push(level);
        row_pieces = next;
    }
    all
}

/// Adds the ends of the pieces of a row of `n` entries; a row without entries is one piece.
fn cut(offsets: &mut Vec<u32>, n: usize) {
    let start = offsets[offsets.len() - 1];
    for piece in 1..=n.div_ceil(PIECE).max(1) {
        offsets.push(start + (piece * PIECE).min(n) as u32);
    }
}

impl GpuCsr {
    /// Brings `csr` to the GPU of `client`.
    pub fn new<R: Runtime>(csr: &Csr, client: &ComputeClient<R>) -> Self {
        // An empty buffer can't be bound to a kernel: one number that is never read stands for it.
        let words = |x: &[u32]| client.create_from_slice(bytemuck::cast_slice(if x.is_empty() { &[0] } else { x }));
        let load = |level: HostLevel| Level {
            rows: level.offsets.len() - 1,
            entries: level.columns.len(),
            offsets: words(&level.offsets),
            columns: words(&level.columns),
            values: words(bytemuck::cast_slice(&level.values)),
        };
        GpuCsr { cols: csr.cols(), levels: Arc::new(levels(csr).into_iter().map(load).collect()) }
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.levels.last().map_or(0, |level| level.rows)
    }

    /// `self [rows, cols] x dense [cols, dim]`, both row-major f32; gives the result `[rows, dim]`.
    pub fn product<R: Runtime>(&self, client: &ComputeClient<R>, dense: Handle, dim: usize) -> Handle {
        let (mut dense, mut n) = (dense, self.cols);
        for level in self.levels.iter() {
            dense = level.product(client, dense, [n, dim]);
            n = level.rows;
        }
        dense
    }
}

impl Level {
    fn product<R: Runtime>(&self, client: &ComputeClient<R>, dense: Handle, [n, dim]: [usize; 2]) -> Handle {
        let numbers = self.rows * dim;
        let out = client.empty(numbers.max(1) * size_of::<f32>());
        // Without a row of the dense matrix there is nothing to bind, and no entry either: all sums are 0.
        let dense = if n * dim == 0 { client.create_from_slice(&[0; size_of::<f32>()]) } else { dense };
        if numbers == 0 {
            return out;
        }
        let threads = CubeDim::new(client, numbers);
        let count = calculate_cube_count_elemwise(client, numbers, threads);
        // SAFETY: the lengths are those of the buffers; columns lie below the dense matrix's rows, offsets below the
        // entries (`Csr` and `levels` see to it), and the kernel leaves threads beyond `out` out.
        unsafe {
            rows_kernel::launch_unchecked::<R>(
                client,
                count,
                threads,
                ArrayArg::from_raw_parts(self.offsets.clone(), self.rows + 1),
                ArrayArg::from_raw_parts(self.columns.clone(), self.entries.max(1)),
                ArrayArg::from_raw_parts(self.values.clone(), self.entries.max(1)),
                ArrayArg::from_raw_parts(dense, (n * dim).max(1)),
                ArrayArg::from_raw_parts(out.clone(), numbers),
                dim,
            );
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recommenders::sparse::csr_matmul;

    /// The levels one after the other on the host.
    fn on_host(levels: &[HostLevel], dense: &[f32], dim: usize) -> Vec<f32> {
        levels.iter().fold(dense.to_vec(), |dense, level| {
            let row = |range: &[u32]| {
                let mut sums = vec![0f32; dim];
                for k in range[0] as usize..range[1] as usize {
                    let source = &dense[level.columns[k] as usize * dim..][..dim];
                    sums.iter_mut().zip(source).for_each(|(s, x)| *s += level.values[k] * x);
                }
                sums
            };
            level.offsets.windows(2).flat_map(row).collect()
        })
    }

    /// Rows of 0, 1, 255 to 257 and 70,000 entries.
    pub(super) fn uneven() -> (Csr, Vec<f32>, usize) {
        let lengths = [3usize, 0, 255, 256, 257, 70_000, 1, 0];
        let entries: Vec<(u32, u32, f32)> = lengths
            .iter()
            .enumerate()
            .flat_map(|(row, &n)| (0..n).map(move |k| (row as u32, k as u32, ((k + row) as f32 * 0.37).sin())))
            .collect();
        let dim = 5;
        let dense = (0..70_000 * dim).map(|n| (n as f32 * 0.11).sin()).collect();
        (Csr::from_entries(lengths.len(), 70_000, &entries).unwrap(), dense, dim)
    }

    #[test]
    fn levels_give_the_product_whatever_the_rows_lengths() {
        let (csr, dense, dim) = uneven();
        let levels = levels(&csr);
        assert_eq!(levels.len(), 3); // 70,000 entries, 274 pieces, 2 pieces
        let mut want = vec![0f32; csr.rows() * dim];
        csr_matmul(&csr, &dense, dim, &mut want);
        for (got, want) in on_host(&levels, &dense, dim).iter().zip(&want) {
            assert!((got - want).abs() < 1e-2, "{got} is not {want}");
        }
        let nothing = Csr::from_entries(0, 3, &[]).unwrap();
        assert_eq!(super::levels(&nothing).len(), 1);
    }
}
