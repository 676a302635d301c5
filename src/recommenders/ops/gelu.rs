//! The Gaussian error linear unit, `x * Phi(x)` with the normal distribution's `Phi` (not its tanh approximation).
//!
//! In: a tensor. Out: one of its shape. Absolute error below 1e-6 times `max(1, |x|)`.

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Shape, Tensor};
use rayon::prelude::*;

use super::exp::exp;
use super::fused::{FusedBackend, Operation, Pass, lift, lower};
use super::widest::{Work, multiply_add, widest};

/// `x * Phi(x)` of every number.
pub fn gelu<B: FusedBackend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    lift(B::fused(Gelu, [lower(x)]))
}

#[derive(Clone, Debug)]
struct Gelu;

/// Numbers of a unit of parallel work.
const CHUNK: usize = 1 << 14;

struct Forward<'a>(&'a mut [f32], &'a [f32]);

impl Work for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (out, &x) in self.0.iter_mut().zip(self.1) {
            *out = x * phi::<FMA>(x);
        }
    }
}

/// Result, operand, upstream gradient.
struct Backward<'a>(&'a mut [f32], &'a [f32], &'a [f32]);

impl Work for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        const DENSITY: f32 = 0.398_942_3; // of the normal distribution at 0
        for ((out, &x), &up) in self.0.iter_mut().zip(self.1).zip(self.2) {
            let density = DENSITY * exp::<FMA>(-0.5 * x * x);
            *out = up * multiply_add::<FMA>(x, density, phi::<FMA>(x));
        }
    }
}

/// The normal distribution, `(1 + erf(x / sqrt 2)) / 2`; erf by the rational approximation that Eigen and XLA use,
/// which is right to a few units in the last place.
#[inline(always)]
fn phi<const FMA: bool>(x: f32) -> f32 {
    let x = x * std::f32::consts::FRAC_1_SQRT_2;
    let x = if x > 4.0 { 4.0 } else { x };
    let x = if x < -4.0 { -4.0 } else { x };
    let square = x * x;
    let mut p = -2.726_142_3e-10;
    for c in [2.770_681_4e-8, -2.101_024e-6, -5.692_506_4e-5, -7.349_906_3e-4, -2.954_6e-3, -1.609_603_3e-2] {
        p = multiply_add::<FMA>(p, square, c);
    }
    let mut q = -1.456_607_2e-5;
    for c in [-2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2] {
        q = multiply_add::<FMA>(q, square, c);
    }
    multiply_add::<FMA>(0.5 * x, p / q, 0.5)
}

impl Operation<1> for Gelu {
    type Saved = ();

    fn plain<B: Backend>(&self, [x]: [FloatTensor<B>; 1]) -> FloatTensor<B> {
        B::gelu(x)
    }

    fn shape(&self, [x]: [Shape; 1]) -> Shape {
        x
    }

    fn forward(&self, [x]: [&[f32]; 1]) -> Vec<f32> {
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(out, x)| widest(Forward(out, x)));
        out
    }

    fn forward_saved(&self, x: [&[f32]; 1]) -> (Vec<f32>, ()) {
        (self.forward(x), ())
    }

    fn backward(&self, pass: Pass<'_, (), 1>) -> [Vec<f32>; 1] {
        let [x] = pass.operands;
        let mut out = vec![0f32; x.len()];
        let work = out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).zip(pass.upstream.par_chunks(CHUNK));
        work.for_each(|((out, x), up)| widest(Backward(out, x, up)));
        [out]
    }
}

#[cfg(test)]
mod tests {
    use super::super::checks::{agree, numbers};
    use super::*;

    #[test]
    fn values_and_gradients_equal_those_of_the_plain_operation() {
        let x: Vec<f32> = numbers(40_000, 0.9).iter().map(|x| x * 7.0).collect();
        agree(&Gelu, [(x, vec![200, 200])]);
        agree(&Gelu, [(vec![0.0, -0.0, 1e-20, -30.0, 30.0], vec![5])]);
        assert!(Gelu.forward([&[f32::NAN]])[0].is_nan());
    }

    #[test]
    fn the_distribution_is_right_in_both_forms() {
        // Values of the normal distribution from tables.
        for (x, want) in [(0.0, 0.5), (1.0, 0.841_344_7), (-1.0, 0.158_655_25), (2.0, 0.977_249_9), (-3.0, 0.001_349_9)]
        {
            for got in [phi::<true>(x), phi::<false>(x)] {
                assert!((got - want).abs() < 2e-7, "{x}: {got} is not {want}");
            }
        }
    }
}
