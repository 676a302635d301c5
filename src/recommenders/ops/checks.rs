//! What the tests of operations share.

use burn::backend::{Autodiff, Flex};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Bytes, DType, Shape, Tensor};
use burn_flex::{FlexTensor, Layout};

use super::fused::{FusedBackend, Operation, lift};

type Ad = Autodiff<Flex>;

/// `n` numbers in `[-1, 1]`.
pub fn numbers(n: usize, k: f32) -> Vec<f32> {
    (0..n).map(|x| (x as f32 * k).sin()).collect()
}

/// Checks that an operation in one piece gives the values and gradients of its form in Burn's operations, and the same
/// bits on one thread and on five.
pub fn agree<O: Operation<N>, const N: usize>(operation: &O, operands: [(Vec<f32>, Vec<usize>); N]) {
    let run = |fused: bool| -> Vec<Vec<f32>> {
        let leaves = operands.each_ref().map(|(values, shape)| {
            let shape = Shape::from(shape.clone());
            let x = FlexTensor::new(Bytes::from_elems(values.clone()), Layout::contiguous(shape), DType::F32);
            <Ad as burn::tensor::backend::AutodiffBackend>::from_inner(x)
        });
        let leaves = leaves.map(|x| x.require_grad());
        let result = match fused {
            true => Ad::fused(operation.clone(), leaves.clone()),
            false => operation.plain::<Ad>(leaves.clone()),
        };
        let values = result.primitive.to_contiguous().storage::<f32>().to_vec();
        let n = values.len();
        let result: FloatTensor<Ad> = <Ad as burn::tensor::ops::FloatTensorOps<Ad>>::float_reshape(result, [n].into());
        let upstream = Tensor::<Ad, 1>::from_floats(numbers(n, 2.1).as_slice(), &Default::default());
        let grads = (lift::<Ad, 1>(result) * upstream).sum().backward();
        let mut all = vec![values];
        for leaf in leaves {
            let grad = leaf.grad(&grads).expect("every operand has a gradient");
            all.push(grad.to_contiguous().storage::<f32>().to_vec());
        }
        all
    };
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(true))
    };
    let (got, want) = (with(1), run(false));
    assert_eq!(got, with(5), "threads change bits");
    for (which, (got, want)) in got.iter().zip(&want).enumerate() {
        assert_eq!(got.len(), want.len());
        let scale = want.iter().fold(0f32, |m, x| m.max(x.abs())).max(1e-3);
        for (n, (x, y)) in got.iter().zip(want).enumerate() {
            assert!((x - y).abs() <= 2e-5 * scale, "{operation:?}: result {which}, element {n}: {x} is not {y}");
        }
    }
}
