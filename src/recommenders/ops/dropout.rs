//! Dropout whose choice depends on a seed and the place alone: the same on every back end, for any number of
//! threads, and again in the backward pass, so that no mask is kept.
//!
//! In: a tensor, the share to drop, a seed. Out: the tensor with that share of its numbers 0 and the others scaled up.

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Shape, Tensor, TensorData, TensorMetadata, TensorPrimitive};
use rayon::prelude::*;

use super::fused::{FusedBackend, Operation, Pass, lift, lower};
use super::widest::{Work, widest};

/// Which numbers are dropped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    /// Hashes below are dropped.
    limit: u32,
    /// Factor of what is kept.
    scale: f32,
    seed: u64,
}

impl Choice {
    /// Drops `share` in `[0, 1)`; `None` where that is 0.
    pub fn new(share: f32, seed: u64) -> Option<Choice> {
        assert!((0.0..1.0).contains(&share), "a share of {share} can't be dropped");
        let limit = (f64::from(share) * f64::from(u32::MAX)).round() as u32;
        (limit > 0).then(|| Choice { limit, scale: 1.0 / (1.0 - share), seed })
    }

    /// The factors, 0 or the scale, of the first columns of row number `row`.
    pub fn factors(&self, row: u64, out: &mut [f32]) {
        // SplitMix64 for the row; for a column 32-bit operations, of which a register holds many.
        let mut x = self.seed ^ row.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let start = (x ^ (x >> 31)) as u32;
        widest(Columns(start, *self, out));
    }
}

/// The row's hash, and the factors.
struct Columns<'a>(u32, Choice, &'a mut [f32]);

impl Work for Columns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        columns(self.0, self.1, self.2);
    }
}

#[inline(always)]
fn columns(start: u32, choice: Choice, out: &mut [f32]) {
    for (column, out) in out.iter_mut().enumerate() {
        // Two rounds of multiply and shift, constants by Chris Wellons ("lowbias32").
        let mut x = start ^ (column as u32).wrapping_mul(0x9E37_79B9);
        x = (x ^ (x >> 16)).wrapping_mul(0x7FEB_352D);
        x = (x ^ (x >> 15)).wrapping_mul(0x846C_A68B);
        x ^= x >> 16;
        *out = if x >= choice.limit { choice.scale } else { 0.0 };
    }
}

/// Sets `share` (in `[0, 1)`) of the numbers of `x` to 0 and scales the others up by `1 / (1 - share)`.
///
/// Which ones depends on `seed` and the place alone: give every call of a step its own seed.
pub fn dropout<B: FusedBackend, const D: usize>(x: Tensor<B, D>, share: f32, seed: u64) -> Tensor<B, D> {
    let width = x.dims()[D - 1];
    match Choice::new(share, seed) {
        Some(choice) => lift(B::fused(Dropout { choice, width }, [lower(x)])),
        None => x,
    }
}

/// The operation on rows of `width`.
#[derive(Clone, Debug)]
struct Dropout {
    choice: Choice,
    width: usize,
}

impl Dropout {
    fn applied(&self, x: &[f32]) -> Vec<f32> {
        let width = self.width.max(1);
        let rows = (1usize << 14).div_ceil(width);
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut(rows * width).zip(x.par_chunks(rows * width)).enumerate().for_each(|(n, (out, x))| {
            for (row, (out, x)) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)).enumerate() {
                self.choice.factors((n * rows + row) as u64, out);
                out.iter_mut().zip(x).for_each(|(o, x)| *o *= x);
            }
        });
        out
    }
}

impl Operation<1> for Dropout {
    type Saved = ();

    fn plain<B: Backend>(&self, [x]: [FloatTensor<B>; 1]) -> FloatTensor<B> {
        let shape = x.shape();
        let n = shape.num_elements();
        let x = Tensor::<B, 1>::from_primitive(TensorPrimitive::Float(B::float_reshape(x, [n].into())));
        let factors = Tensor::from_data(TensorData::new(self.applied(&vec![1.0; n]), [n]), &x.device());
        B::float_reshape(lower(x * factors), shape)
    }

    fn shape(&self, [x]: [Shape; 1]) -> Shape {
        x
    }

    fn forward(&self, [x]: [&[f32]; 1]) -> Vec<f32> {
        self.applied(x)
    }

    fn forward_saved(&self, [x]: [&[f32]; 1]) -> (Vec<f32>, ()) {
        (self.applied(x), ())
    }

    fn backward(&self, pass: Pass<'_, (), 1>) -> [Vec<f32>; 1] {
        [self.applied(pass.upstream)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use burn::backend::{Autodiff, Flex};

    type Ad = Autodiff<Flex>;

    #[test]
    fn the_share_is_kept_to_and_places_are_independent() {
        let choice = Choice::new(0.2, 7).unwrap();
        let (rows, width) = (2000, 97);
        let mut all = vec![0f32; rows * width];
        all.chunks_exact_mut(width).enumerate().for_each(|(row, out)| choice.factors(row as u64, out));
        assert!(all.iter().all(|f| *f == 0.0 || *f == 1.25));
        let kept =
            |at: &dyn Fn(usize) -> usize, n: usize| (0..n).filter(|&k| all[at(k)] > 0.0).count() as f64 / n as f64;
        assert!((kept(&|k| k, rows * width) - 0.8).abs() < 0.004);
        for column in [0, 1, 50, 96] {
            assert!((kept(&|k| k * width + column, rows) - 0.8).abs() < 0.04, "column {column}");
        }
        // Neighbours, in the row and in the column, both kept: .8 * .8.
        for step in [1, 2, width, 16 * width] {
            let n = all.len() - step;
            let both = (0..n).filter(|&k| all[k] > 0.0 && all[k + step] > 0.0).count() as f64 / n as f64;
            assert!((both - 0.64).abs() < 0.006, "step {step}: {both}");
        }
        let mut other = vec![0f32; width];
        Choice::new(0.2, 8).unwrap().factors(0, &mut other);
        assert_ne!(other, all[..width]);
        assert!(Choice::new(0.0, 1).is_none());
    }

    #[test]
    fn vectors_of_any_width_choose_the_same() {
        let choice = Choice::new(0.37, 99).unwrap();
        let (mut fast, mut plain) = (vec![0f32; 133], vec![0f32; 133]);
        choice.factors(12, &mut fast);
        let mut x = choice.seed ^ 12u64.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        columns((x ^ (x >> 31)) as u32, choice, &mut plain);
        assert_eq!(fast, plain);
    }

    #[test]
    fn the_gradient_goes_through_what_was_kept() {
        let device = Default::default();
        let values: Vec<f32> = (0..5000).map(|n| (n as f32 * 0.1).sin() + 2.0).collect();
        let x = Tensor::<Ad, 3>::from_data(TensorData::new(values.clone(), [10, 20, 25]), &device).require_grad();
        let y = dropout(x.clone(), 0.3, 5);
        let grads = (y.clone() * 3.0).sum().backward();
        let y: Vec<f32> = y.into_data().to_vec().unwrap();
        let dx: Vec<f32> = x.grad(&grads).unwrap().into_data().to_vec().unwrap();
        for ((x, y), d) in values.iter().zip(&y).zip(&dx) {
            let factor = y / x;
            assert!((d - 3.0 * factor).abs() < 1e-5, "{d} is not {factor} * 3");
        }
        let x = Tensor::<Flex, 2>::from_data(TensorData::new(values, [200, 25]), &device);
        let plain = Dropout { choice: Choice::new(0.3, 5).unwrap(), width: 25 }.plain::<Flex>([lower(x.clone())]);
        assert_eq!(lift::<Flex, 2>(plain).into_data().to_vec::<f32>().unwrap(), y);
        // The factors are those of the row's number.
        let mut factors = vec![0f32; 25];
        Choice::new(0.3, 5).unwrap().factors(3, &mut factors);
        let row: Vec<f32> = x.slice([3..4, 0..25]).into_data().to_vec().unwrap();
        for n in 0..25 {
            assert_eq!(row[n] * factors[n], y[75 + n]);
        }
    }
}
