//! Sparse matrices and their product with a dense one, an operation of our own with a
//! gradient rule; graph recommenders spend nearly all their time in it.
//!
//! In: `(row, column, value)` entries. Out: [`Csr`] on the host, [`SparseMatrix`] on a back
//! end, and [`SparseMatrix::matmul`]: `[rows, cols] x [cols, dim] -> [rows, dim]`.
//!
//! * On Flex a Rayon kernel works on the tensors' own storage, one row of the result at a
//!   time and in the order of the row's entries, so the result is the same to the bit for
//!   any number of threads.
//! * On a GPU (`--features cuda`) a cubecl kernel does, one thread per number of the result (`src/device/`).
//! * For any other back end of Burn there is [`RowTree`], which does it with gathers and sums, no scatter, so it is
//!   deterministic there too.
//! * The gradient with respect to the dense matrix is the product with the transpose; the
//!   sparse matrix is a constant.

mod csr;
mod kernel;
mod op;
mod row_tree;

pub use csr::Csr;
pub use kernel::csr_matmul;
pub use op::{SparseBackend, SparseMatrix, SparsePair};
pub use row_tree::RowTree;
