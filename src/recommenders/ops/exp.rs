//! Softmax's parts over a row of numbers on the CPU: its greatest, exponentials and their sum.
//!
//! In: slices. Out: numbers. The sums are taken in 32 lanes, in one order on every machine of an architecture
//! that has fused multiply-adds. NaN and infinity in give NaN out, so that a diverging
//! training is seen.

use super::widest::{Work, multiply_add, widest};

/// Partial sums per row: two registers of AVX-512, four of AVX2.
const LANES: usize = 32;

/// Exponentials of anything below are those of this (1.2e-38; beside the row's greatest it is nothing).
const LEAST: f32 = -87.3;

/// The greatest of `row`; NaN is passed over. Minus infinity of nothing.
pub fn greatest(row: &[f32]) -> f32 {
    widest(Greatest(row))
}

/// `x = exp(x - shift)` of every number of `row`; gives their sum. `shift` is at least the greatest of them.
/// Relative error below 2e-7 each.
pub fn exponentials(row: &mut [f32], shift: f32) -> f32 {
    widest(Exponentials(row, shift))
}

struct Greatest<'a>(&'a [f32]);

impl Work for Greatest<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> f32 {
        greatest_body(self.0)
    }
}

struct Exponentials<'a>(&'a mut [f32], f32);

impl Work for Exponentials<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> f32 {
        exponentials_body::<FMA>(self.0, self.1)
    }
}

#[inline(always)]
fn greatest_body(row: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = larger(*lane, x);
    }
    for half in [16, 8, 4, 2, 1] {
        for n in 0..half {
            lanes[n] = larger(lanes[n], lanes[n + half]);
        }
    }
    lanes[0]
}

#[inline(always)]
fn exponentials_body<const FMA: bool>(row: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *x = exp::<FMA>(*x - shift);
            *lane += *x;
        }
    }
    if !rest.is_empty() {
        // Whole vectors again; what is not there counts as exp(-87.3), which changes no sum that matters.
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..rest.len()].copy_from_slice(rest);
        for (lane, x) in lanes.iter_mut().zip(&mut last) {
            *x = exp::<FMA>(*x - shift);
            *lane += *x;
        }
        rest.copy_from_slice(&last[..rest.len()]);
    }
    for half in [16, 8, 4, 2, 1] {
        for n in 0..half {
            lanes[n] += lanes[n + half];
        }
    }
    lanes[0]
}

/// `exp(x)` for `x <= 0`, without branches: `2^n * exp(r)` with `|r| <= ln 2 / 2` and the polynomial of Cephes'
/// `expf`.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to the nearest whole number, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let x = if LEAST > x { LEAST } else { x }; // NaN stays NaN
    let shifted = multiply_add::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts, so that n * ln 2 is exact to beyond f32.
    let r = multiply_add::<FMA>(n, 2.121_944_4e-4, multiply_add::<FMA>(n, -0.693_359_4, x));
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = multiply_add::<FMA>(p, r, c);
    }
    let p = multiply_add::<FMA>(p * r, r, r) + 1.0;
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worst(run: impl Fn(&mut [f32], f32) -> f32) -> f64 {
        let mut worst = 0f64;
        for n in [1usize, 31, 32, 33, 1000, 4099] {
            let x: Vec<f32> = (0..n).map(|k| 3.0 - (k as f32 * 0.7391) % 80.0).collect();
            let mut got = x.clone();
            let sum = run(&mut got, 3.0);
            let want: Vec<f64> = x.iter().map(|&x| f64::from(x - 3.0).exp()).collect();
            for (got, want) in got.iter().zip(&want) {
                worst = worst.max((f64::from(*got) / want - 1.0).abs());
            }
            worst = worst.max((f64::from(sum) / want.iter().sum::<f64>() - 1.0).abs());
        }
        worst
    }

    #[test]
    fn exponentials_are_right_in_every_form() {
        assert!(worst(exponentials) < 3e-7, "{}", worst(exponentials));
        assert!(worst(exponentials_body::<false>) < 3e-7, "{}", worst(exponentials_body::<false>));
        let mut row = [0.0f32, -1e30, f32::NEG_INFINITY, -87.4];
        assert_eq!(exponentials(&mut row, 0.0), 1.0);
        assert!(row[0] == 1.0 && row[1..].iter().all(|x| *x < 2e-38));
    }

    #[test]
    fn what_is_not_a_number_stays_so() {
        assert_eq!(greatest(&[f32::NAN, 2.0, -1.0]), 2.0);
        assert_eq!(greatest(&[]), f32::NEG_INFINITY);
        let mut row = vec![0.5f32; 70];
        assert!(!exponentials(&mut row.clone(), f32::INFINITY).is_nan()); // exp(-inf) = 0
        row[40] = f32::NAN;
        assert!(exponentials(&mut row, 0.5).is_nan());
        let mut row = vec![f32::INFINITY; 40];
        assert!(exponentials(&mut row, f32::INFINITY).is_nan());
    }
}
