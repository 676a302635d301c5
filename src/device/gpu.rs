//! What the back ends that run on a GPU do of our own operations: the sparse product by a kernel of ours, the
//! others in Burn's operations. In `device`, since only this module may depend on a build's features.

use std::sync::Arc;

use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};

use super::gpu_kernel::GpuCsr;
use crate::recommenders::ops::FusedBackend;
use crate::recommenders::optim::AdamBackend;
use crate::recommenders::sparse::{Csr, SparseBackend, SparsePair};

impl<R, F, I, T> SparseBackend for CubeBackend<R, F, I, T>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    T: BoolElement,
{
    type Sparse = GpuCsr;

    fn sparse_from_csr(csr: Arc<Csr>, device: &Self::Device) -> GpuCsr {
        GpuCsr::new(&csr, &R::client(device))
    }

    fn sparse_matmul(sparse: &SparsePair<GpuCsr>, dense: FloatTensor<Self>) -> FloatTensor<Self> {
        assert_eq!(dense.dtype(), DType::F32, "models are f32 on every back end");
        let matrix = sparse.forward();
        let CubeTensor { client, handle, meta, device, .. } = into_contiguous(dense);
        let dim = meta.shape()[1];
        let out = matrix.product(&client, handle, dim);
        CubeTensor::new_contiguous(client, device, Shape::new([matrix.rows(), dim]), out, DType::F32)
    }
}

impl<R: CubeRuntime, F: FloatElement, I: IntElement, T: BoolElement> AdamBackend for CubeBackend<R, F, I, T> {}
impl<R: CubeRuntime, F: FloatElement, I: IntElement, T: BoolElement> FusedBackend for CubeBackend<R, F, I, T> {}
