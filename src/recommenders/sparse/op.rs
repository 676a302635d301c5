//! The sparse product as an operation of the back ends, with its gradient rule.

use std::fmt::Debug;
use std::sync::Arc;

use burn::backend::Autodiff;
use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, unary};
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Bytes, DType, Shape, Tensor, TensorMetadata, TensorPrimitive};
use burn_flex::{FlexTensor, Layout};

use super::{Csr, kernel};

/// A back end that can multiply a sparse matrix with a dense one.
pub trait SparseBackend: Backend {
    /// A sparse matrix where this back end wants it; cheap to clone.
    type Sparse: Clone + Debug + Send + Sync + 'static;

    /// Brings a matrix to `device`.
    fn sparse_from_csr(csr: Arc<Csr>, device: &Self::Device) -> Self::Sparse;

    /// `sparse.forward() [rows, cols] x dense [cols, dim] -> [rows, dim]`.
    fn sparse_matmul(sparse: &SparsePair<Self::Sparse>, dense: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// A matrix and its transpose, which the gradient needs.
#[derive(Clone, Debug)]
pub struct SparsePair<S> {
    forward: S,
    transposed: S,
}

impl<S: Clone> SparsePair<S> {
    /// The matrix `[rows, cols]`.
    pub fn forward(&self) -> &S {
        &self.forward
    }

    /// The pair of the transpose.
    pub fn t(&self) -> Self {
        SparsePair { forward: self.transposed.clone(), transposed: self.forward.clone() }
    }
}

/// A constant sparse matrix `[rows, cols]` on a back end.
#[derive(Clone, Debug)]
pub struct SparseMatrix<B: SparseBackend> {
    pair: SparsePair<B::Sparse>,
    rows: usize,
    cols: usize,
}

impl<B: SparseBackend> SparseMatrix<B> {
    /// Brings `csr` and its transpose to `device`. A symmetric matrix is kept once.
    pub fn new(csr: Csr, device: &B::Device) -> Self {
        let (rows, cols) = (csr.rows(), csr.cols());
        let transposed = csr.transpose();
        let symmetric = transposed == csr;
        let forward = B::sparse_from_csr(Arc::new(csr), device);
        let transposed = match symmetric {
            true => forward.clone(),
            false => B::sparse_from_csr(Arc::new(transposed), device),
        };
        SparseMatrix { pair: SparsePair { forward, transposed }, rows, cols }
    }

    /// Brings a matrix that is its own transpose to `device`, without looking.
    pub fn symmetric(csr: Csr, device: &B::Device) -> Self {
        let (rows, cols) = (csr.rows(), csr.cols());
        let forward = B::sparse_from_csr(Arc::new(csr), device);
        SparseMatrix { pair: SparsePair { forward: forward.clone(), transposed: forward }, rows, cols }
    }

    /// `self [rows, cols] x dense [cols, dim] -> [rows, dim]`; gradients flow to `dense`.
    ///
    /// # Panics
    /// When the shapes do not fit (our bug).
    pub fn matmul(&self, dense: Tensor<B, 2>) -> Tensor<B, 2> {
        let [n, dim] = dense.dims();
        assert_eq!(n, self.cols, "a sparse [{}, {}] matrix times a dense [{n}, {dim}]", self.rows, self.cols);
        let product = B::sparse_matmul(&self.pair, dense.into_primitive().tensor());
        Tensor::from_primitive(TensorPrimitive::Float(product))
    }
}

impl<B: SparseBackend, C: CheckpointStrategy> SparseMatrix<Autodiff<B, C>> {
    /// The same matrix for tensors without gradients.
    pub fn inner(&self) -> SparseMatrix<B> {
        SparseMatrix { pair: self.pair.clone(), rows: self.rows, cols: self.cols }
    }
}

impl SparseBackend for Flex {
    type Sparse = Arc<Csr>;

    fn sparse_from_csr(csr: Arc<Csr>, _device: &Self::Device) -> Self::Sparse {
        csr
    }

    fn sparse_matmul(sparse: &SparsePair<Arc<Csr>>, dense: FlexTensor) -> FlexTensor {
        let matrix = sparse.forward();
        let dim = dense.shape()[1];
        let dense = dense.to_contiguous(); // copies only what is not contiguous yet
        let mut out = vec![0f32; matrix.rows() * dim];
        kernel::csr_matmul(matrix, dense.storage::<f32>(), dim, &mut out);
        FlexTensor::new(Bytes::from_elems(out), Layout::contiguous(Shape::new([matrix.rows(), dim])), DType::F32)
    }
}

/// The gradient rule: `d dense = transpose x d out`.
#[derive(Debug)]
struct ProductRule;

impl<B: SparseBackend> Backward<B, 1> for ProductRule {
    type State = SparsePair<B::Sparse>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let transposed = ops.state.t();
        unary::<B, _>(ops.parents, ops.node, grads, |grad| B::sparse_matmul(&transposed, grad));
    }
}

impl<B: SparseBackend, C: CheckpointStrategy> SparseBackend for Autodiff<B, C> {
    type Sparse = B::Sparse;

    fn sparse_from_csr(csr: Arc<Csr>, device: &Self::Device) -> Self::Sparse {
        B::sparse_from_csr(csr, device)
    }

    fn sparse_matmul(sparse: &SparsePair<B::Sparse>, dense: FloatTensor<Self>) -> FloatTensor<Self> {
        let product = B::sparse_matmul(sparse, dense.primitive);
        match Backward::<B, 1>::prepare::<C>(ProductRule, [dense.node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(sparse.clone(), product),
            OpsKind::UnTracked(prep) => prep.finish(product),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::RowTree;
    use super::*;
    use burn::tensor::TensorData;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    type Ad = Autodiff<Flex>;

    /// A rectangular matrix with an empty row and an empty column, and a dense `[cols, dim]`.
    fn case(rows: usize, cols: usize, dim: usize) -> (Csr, Vec<f32>) {
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        let entries: Vec<(u32, u32, f32)> = (0..rows as u32 - 1)
            .flat_map(|r| (1..cols as u32).map(move |c| (r, c)))
            .filter_map(|(r, c)| if rng.random_bool(0.3) { Some((r, c, rng.random_range(-1.0..1.0))) } else { None })
            .collect();
        let dense = (0..cols * dim).map(|_| rng.random_range(-1.0..1.0)).collect();
        (Csr::from_entries(rows, cols, &entries).unwrap(), dense)
    }

    fn as_dense<B: Backend>(csr: &Csr) -> Tensor<B, 2> {
        let mut all = vec![0f32; csr.rows() * csr.cols()];
        for r in 0..csr.rows() {
            let (columns, values) = csr.row(r);
            for (&c, &v) in columns.iter().zip(values) {
                all[r * csr.cols() + c as usize] = v;
            }
        }
        Tensor::from_data(TensorData::new(all, [csr.rows(), csr.cols()]), &Default::default())
    }

    fn values<B: Backend>(t: Tensor<B, 2>) -> Vec<f32> {
        t.into_data().to_vec().unwrap()
    }

    fn close(a: &[f32], b: &[f32], tolerance: f32) {
        assert_eq!(a.len(), b.len());
        for (n, (x, y)) in a.iter().zip(b).enumerate() {
            assert!((x - y).abs() <= tolerance, "element {n}: {x} is not {y}");
        }
    }

    #[test]
    fn product_and_gradient_equal_those_of_the_dense_product() {
        let (csr, x) = case(13, 9, 5);
        let device = Default::default();
        let weights = Tensor::<Ad, 2>::from_data(
            TensorData::new((0..13 * 5).map(|n| (n as f32 * 0.37).sin()).collect::<Vec<f32>>(), [13, 5]),
            &device,
        );
        let run = |sparse: bool| {
            let x = Tensor::<Ad, 2>::from_data(TensorData::new(x.clone(), [9, 5]), &device).require_grad();
            let y = match sparse {
                true => SparseMatrix::<Ad>::new(csr.clone(), &device).matmul(x.clone()),
                false => as_dense::<Ad>(&csr).matmul(x.clone()),
            };
            let loss = (y.clone() * y.clone() * weights.clone()).sum();
            let grads = loss.backward();
            (values(y), values(x.grad(&grads).unwrap()))
        };
        let (sparse, dense) = (run(true), run(false));
        close(&sparse.0, &dense.0, 1e-5);
        close(&sparse.1, &dense.1, 1e-4);
    }

    #[test]
    fn gradient_equals_finite_differences() {
        let (csr, x) = case(6, 5, 3);
        let device = Default::default();
        let matrix = SparseMatrix::<Ad>::new(csr, &device);
        let weight = |n: usize| 0.5 + (n as f32 * 1.3).cos();
        let weights =
            Tensor::<Ad, 2>::from_data(TensorData::new((0..6 * 3).map(weight).collect::<Vec<f32>>(), [6, 3]), &device);
        let tensor = |x: &[f32]| Tensor::<Ad, 2>::from_data(TensorData::new(x.to_vec(), [5, 3]), &device);
        let loss = |x: Tensor<Ad, 2>| (matrix.matmul(x).tanh() * weights.clone()).sum();
        let input = tensor(&x).require_grad();
        let grads = loss(input.clone()).backward();
        let got = values(input.grad(&grads).unwrap());
        // tanh is smooth, so a central difference with h = 1e-2 is right to about 1e-4; the sum in f64
        // below keeps rounding out of it.
        let value = |x: &[f32]| {
            let y = values(matrix.matmul(tensor(x)));
            y.iter().enumerate().map(|(n, y)| f64::from(*y).tanh() * f64::from(weight(n))).sum::<f64>()
        };
        for (n, &got) in got.iter().enumerate() {
            let (mut up, mut down) = (x.clone(), x.clone());
            up[n] += 1e-2;
            down[n] -= 1e-2;
            let want = (value(&up) - value(&down)) / f64::from(up[n] - down[n]);
            assert!((f64::from(got) - want).abs() < 1e-3, "element {n}: {got} is not {want}");
        }
        assert!(got.iter().any(|g| g.abs() > 0.1));
    }

    #[test]
    fn a_transposed_view_is_read_in_the_right_order() {
        let (csr, x) = case(7, 4, 6);
        let device = Default::default();
        let matrix = SparseMatrix::<Flex>::new(csr.clone(), &device);
        let view = Tensor::<Flex, 2>::from_data(TensorData::new(x, [6, 4]), &device).transpose();
        let want = values(as_dense::<Flex>(&csr).matmul(view.clone()));
        close(&values(matrix.matmul(view)), &want, 1e-5);
    }

    #[test]
    fn an_untracked_tensor_passes_through_autodiff() {
        let (csr, x) = case(4, 4, 2);
        let device = Default::default();
        let y = SparseMatrix::<Ad>::new(csr.clone(), &device)
            .matmul(Tensor::<Ad, 2>::from_data(TensorData::new(x.clone(), [4, 2]), &device));
        let want = SparseMatrix::<Flex>::new(csr, &device)
            .matmul(Tensor::<Flex, 2>::from_data(TensorData::new(x, [4, 2]), &device));
        assert_eq!(values(y), values(want));
    }

    #[test]
    fn the_way_of_other_back_ends_gives_the_same_product() {
        // Rows with more than 16 and more than 256 entries need several levels.
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut entries: Vec<(u32, u32, f32)> = (0..600).map(|c| (1, c, rng.random_range(-1.0..1.0))).collect();
        entries.extend((0..20).map(|c| (3, c * 3, rng.random_range(-1.0..1.0))));
        entries.push((4, 599, 2.0));
        let csr = Csr::from_entries(6, 600, &entries).unwrap();
        let x: Vec<f32> = (0..600 * 3).map(|_| rng.random_range(-1.0..1.0)).collect();
        let x = Tensor::<Flex, 2>::from_data(TensorData::new(x, [600, 3]), &Default::default());
        let tree = RowTree::<Flex>::new(&csr, &Default::default());
        let got = tree.matmul(x.clone().into_primitive().tensor());
        let got = values(Tensor::<Flex, 2>::from_primitive(TensorPrimitive::Float(got)));
        close(&got, &values(SparseMatrix::<Flex>::new(csr, &Default::default()).matmul(x)), 1e-4);
    }
}
