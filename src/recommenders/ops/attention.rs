//! Multi-head attention over sequences that are padded on the right.
//!
//! In: queries, keys and values `[batch, length, dim]`. Out: `[batch, length, dim]`.

use std::sync::Arc;

use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Bool, Shape, Tensor, TensorData};

use super::dropout::Choice;
use super::fused::{FusedBackend, Operation, Pass, lift, lower};
use super::sequence_attention::{Plan, backward, forward};

/// Which positions a position sees.
#[derive(Clone, Copy, Debug)]
pub struct AttentionMask<'a> {
    /// Real positions of each sequence, `[batch]`; those after them are padding that nobody sees. A sequence
    /// of length 0 sees its first position.
    pub lengths: &'a [u32],
    /// Whether a position sees only itself and those before it.
    pub causal: bool,
}

/// `softmax(q k' / sqrt(dim / heads)) v` per head; 0 at padding. `dropout` is the share of weights, in `[0, 1)`,
/// that are set to 0 (the others scaled up by `1 / (1 - share)`) and a seed; which ones depends on the seed and the
/// place alone.
///
/// # Panics
/// When the shapes do not fit (our bug).
pub fn attention<B: FusedBackend>(
    q: Tensor<B, 3>,
    k: Tensor<B, 3>,
    v: Tensor<B, 3>,
    heads: usize,
    mask: AttentionMask<'_>,
    dropout: Option<(f32, u64)>,
) -> Tensor<B, 3> {
    attention_by_distance(q, k, v, heads, mask, dropout, &[])
}

/// As [`attention`]; each position of distance takes `slopes[head]` off a score (ALiBi, Press et al. 2022, arXiv
/// 2108.12409). `slopes` is `[heads]`, or empty for none.
///
/// # Panics
/// When the shapes do not fit (our bug).
pub fn attention_by_distance<B: FusedBackend>(
    q: Tensor<B, 3>,
    k: Tensor<B, 3>,
    v: Tensor<B, 3>,
    heads: usize,
    mask: AttentionMask<'_>,
    dropout: Option<(f32, u64)>,
    slopes: &[f32],
) -> Tensor<B, 3> {
    let [batch, length, dim] = q.dims();
    assert!(k.dims() == q.dims() && v.dims() == q.dims(), "queries, keys and values of different shapes");
    assert!(batch == mask.lengths.len(), "{batch} sequences and {} lengths", mask.lengths.len());
    assert!(dim.is_multiple_of(heads), "{heads} heads of {dim} numbers");
    assert!(mask.lengths.iter().all(|&n| n as usize <= length), "a sequence longer than {length}");
    let dropout = dropout.and_then(|(share, seed)| Choice::new(share, seed));
    assert!(slopes.is_empty() || slopes.len() == heads, "{} slopes and {heads} heads", slopes.len());
    let (lengths, slopes) = (mask.lengths.into(), slopes.into());
    let operation = Attention { length, dim, heads, lengths, causal: mask.causal, dropout, slopes };
    lift(B::fused(operation, [q, k, v].map(lower)))
}

/// The operation on queries, keys and values.
#[derive(Clone, Debug)]
struct Attention {
    length: usize,
    dim: usize,
    heads: usize,
    lengths: Arc<[u32]>,
    causal: bool,
    dropout: Option<Choice>,
    slopes: Arc<[f32]>,
}

impl Attention {
    fn plan(&self) -> Plan<'_> {
        let Attention { length, dim, heads, causal, dropout, .. } = *self;
        Plan { length, dim, heads, lengths: &self.lengths, causal, dropout, slopes: &self.slopes }
    }

    fn in_burn<B: Backend>(&self, [q, k, v]: [Tensor<B, 3>; 3]) -> Tensor<B, 3> {
        let Attention { length, dim, heads, causal, .. } = *self;
        let (batch, size, device) = (self.lengths.len(), dim / heads, q.device());
        let split = |t: Tensor<B, 3>| t.reshape([batch, length, heads, size]).swap_dims(1, 2);
        let real = |n: u32| (n as usize).max(1);
        let lengths = self.lengths.iter();
        let hidden: Vec<bool> = lengths
            .clone()
            .flat_map(|&n| (0..length).flat_map(move |i| (0..length).map(move |j| j >= real(n) || (causal && j > i))))
            .collect();
        let hidden = Tensor::<B, 4, Bool>::from_data(TensorData::new(hidden, [batch, 1, length, length]), &device);
        let mut scores = split(q).matmul(split(k).swap_dims(2, 3)) / (size as f32).sqrt();
        if !self.slopes.is_empty() {
            let by = |s: f32| (0..length * length).map(move |at| s * (at / length).abs_diff(at % length) as f32);
            let fall: Vec<f32> = self.slopes.iter().flat_map(|&slope| by(slope)).collect();
            scores = scores - Tensor::<B, 4>::from_data(TensorData::new(fall, [1, heads, length, length]), &device);
        }
        let mut weights = softmax(scores.mask_fill(hidden.expand([batch, heads, length, length]), -1e9), 3);
        if let Some(choice) = self.dropout {
            let mut factors = vec![0f32; batch * heads * length * length];
            factors.chunks_exact_mut(length).enumerate().for_each(|(row, out)| choice.factors(row as u64, out));
            weights = weights * Tensor::from_data(TensorData::new(factors, [batch, heads, length, length]), &device);
        }
        let there: Vec<f32> =
            lengths.flat_map(|&n| (0..length).map(move |i| if i < real(n) { 1.0 } else { 0.0 })).collect();
        let there = Tensor::<B, 3>::from_data(TensorData::new(there, [batch, length, 1]), &device);
        weights.matmul(split(v)).swap_dims(1, 2).reshape([batch, length, dim]) * there
    }
}

impl Operation<3> for Attention {
    /// Logarithms of the sums of exponentials.
    type Saved = Vec<f32>;

    fn plain<B: Backend>(&self, operands: [FloatTensor<B>; 3]) -> FloatTensor<B> {
        lower(self.in_burn::<B>(operands.map(lift)))
    }

    fn shape(&self, _operands: [Shape; 3]) -> Shape {
        Shape::new([self.lengths.len(), self.length, self.dim])
    }

    fn forward(&self, operands: [&[f32]; 3]) -> Vec<f32> {
        forward(self.plan(), operands).0
    }

    fn forward_saved(&self, operands: [&[f32]; 3]) -> (Vec<f32>, Vec<f32>) {
        forward(self.plan(), operands)
    }

    fn backward(&self, pass: Pass<'_, Vec<f32>, 3>) -> [Vec<f32>; 3] {
        backward(self.plan(), pass.operands, pass.result, &pass.saved, pass.upstream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::{Autodiff, Flex};
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    type Ad = Autodiff<Flex>;

    /// Result and gradients of queries, keys and values for random numbers of some size.
    fn run(
        [length, dim, heads]: [usize; 3],
        lengths: &[u32],
        causal: bool,
        dropout: Option<(f32, u64)>,
        (fused, size): (bool, f32),
    ) -> Vec<Vec<f32>> {
        let batch = lengths.len();
        let mut rng = ChaCha8Rng::seed_from_u64(17);
        let mut draw = || {
            let values: Vec<f32> = (0..batch * length * dim).map(|_| rng.random_range(-size..size)).collect();
            Tensor::<Ad, 3>::from_data(TensorData::new(values, [batch, length, dim]), &Default::default())
        };
        let [q, k, v] = [draw(), draw(), draw()].map(Tensor::require_grad);
        let upstream = draw() / size;
        let choice = dropout.and_then(|(share, seed)| Choice::new(share, seed));
        // Scores of two heads fall with the distance, those of other numbers of heads do not.
        let slopes: &[f32] = if heads == 2 { &[0.3, 0.02] } else { &[] };
        let mask = AttentionMask { lengths, causal };
        let (lengths, falling) = (lengths.into(), slopes.into());
        let plain = Attention { length, dim, heads, lengths, causal, dropout: choice, slopes: falling };
        let out = match fused {
            true => attention_by_distance(q.clone(), k.clone(), v.clone(), heads, mask, dropout, slopes),
            false => plain.in_burn([q.clone(), k.clone(), v.clone()]),
        };
        let grads = (out.clone() * upstream).sum().backward();
        let mut all = vec![out.into_data().to_vec().unwrap()];
        all.extend([q, k, v].map(|x| x.grad(&grads).unwrap().into_data().to_vec().unwrap()));
        all
    }

    fn close(a: &[Vec<f32>], b: &[Vec<f32>], what: &str) {
        for (which, (a, b)) in a.iter().zip(b).enumerate() {
            assert_eq!(a.len(), b.len());
            let scale = b.iter().fold(0f32, |m, x| m.max(x.abs())).max(1e-3);
            for (n, (x, y)) in a.iter().zip(b).enumerate() {
                assert!((x - y).abs() <= 2e-5 * scale, "{what}: result {which}, element {n}: {x} is not {y}");
            }
        }
    }

    #[test]
    fn values_and_gradients_equal_those_of_the_plain_operations() {
        let cases: [([usize; 3], &[u32]); 5] = [
            ([1, 4, 1], &[1, 0]),
            ([7, 6, 2], &[7, 0, 3, 1]),
            ([20, 64, 4], &[20, 13, 1]),
            ([50, 32, 1], &[50, 17]),
            ([67, 50, 2], &[66, 67, 9]),
        ];
        for (shape, lengths) in cases {
            for causal in [true, false] {
                for dropout in [None, Some((0.3, 9))] {
                    let what = format!("{shape:?}, causal {causal}, dropout {dropout:?}");
                    let [fused, plain] = [true, false].map(|f| run(shape, lengths, causal, dropout, (f, 1.0)));
                    close(&fused, &plain, &what);
                }
            }
        }
    }

    #[test]
    fn gradients_equal_finite_differences_in_double_precision() {
        let (length, dim, n) = (4usize, 2usize, 3usize);
        let got = |q: &[f32], k: &[f32], v: &[f32]| {
            let leaf = |x: &[f32]| {
                let data = TensorData::new(x.to_vec(), [1, length, dim]);
                Tensor::<Ad, 3>::from_data(data, &Default::default()).require_grad()
            };
            let (q, k, v) = (leaf(q), leaf(k), leaf(v));
            let mask = AttentionMask { lengths: &[n as u32], causal: true };
            let out = attention(q.clone(), k.clone(), v.clone(), 1, mask, None);
            let grads = (out.clone() * out).sum().backward();
            [q, k, v].map(|x| x.grad(&grads).unwrap().into_data().to_vec::<f32>().unwrap())
        };
        let value = |x: &[Vec<f64>; 3]| {
            let row = |t: usize, i: usize| &x[t][i * dim..][..dim];
            let mut total = 0.0;
            for i in 0..n {
                let dot = |j: usize| row(0, i).iter().zip(row(1, j)).map(|(a, b)| a * b).sum::<f64>();
                let weights: Vec<f64> = (0..=i).map(|j| (dot(j) / (dim as f64).sqrt()).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for d in 0..dim {
                    total += weights.iter().enumerate().map(|(j, w)| w / sum * row(2, j)[d]).sum::<f64>().powi(2);
                }
            }
            total
        };
        let make = |k: f32| (0..length * dim).map(|n| (n as f32 * k).sin()).collect::<Vec<f32>>();
        let all = [make(0.9), make(1.7), make(2.3)];
        let wide = all.clone().map(|x| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>());
        let got = got(&all[0], &all[1], &all[2]);
        for which in 0..3 {
            for n in 0..length * dim {
                let (mut up, mut down) = (wide.clone(), wide.clone());
                up[which][n] += 1e-5;
                down[which][n] -= 1e-5;
                let want = (value(&up) - value(&down)) / 2e-5;
                assert!((f64::from(got[which][n]) - want).abs() < 1e-5, "operand {which}, element {n}");
            }
        }
    }

    #[test]
    fn large_scores_stay_finite_and_padding_is_not_looked_at() {
        let got = run([30, 16, 2], &[30, 11], true, None, (true, 60.0));
        assert!(got.iter().flatten().all(|x| x.is_finite()));
        let device = Default::default();
        let mut values = vec![0.5f32; 2 * 10 * 8];
        values[7 * 8..80].fill(f32::NAN); // after the 7 positions of the first sequence
        let x = Tensor::<Flex, 3>::from_data(TensorData::new(values, [2, 10, 8]), &device);
        let mask = AttentionMask { lengths: &[7, 10], causal: false };
        let out: Vec<f32> = attention(x.clone(), x.clone(), x, 2, mask, None).into_data().to_vec().unwrap();
        assert!(out[7 * 8..80].iter().all(|x| *x == 0.0));
        assert!(out[..7 * 8].iter().chain(&out[80..]).all(|x| (x - 0.5).abs() < 1e-6));
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let lengths: Vec<u32> = (0..40).map(|n| n % 31).collect();
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run([30, 32, 2], &lengths, true, Some((0.2, 3)), (true, 1.0)))
        };
        assert_eq!(with(1), with(5));
    }

    #[test]
    fn a_batch_of_nothing_is_nothing() {
        assert!(run([5, 4, 2], &[], true, None, (true, 1.0)).iter().all(Vec::is_empty));
    }
}
