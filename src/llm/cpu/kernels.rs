//! The loops between the matrix products of the CPU path: norms, rotation, softmax, SwiGLU.
//!
//! One source for three instruction sets, chosen at run time: AVX-512, AVX2 with FMA, and
//! whatever the target has by default. Every sum has one order, whatever the instruction
//! set, the number of rows of a call or the number of threads: sums go into 16 lanes by index here, and a
//! product (`product.rs`) accumulates over k in a single chain of fused multiply-adds per output. So a prompt's
//! logits do not depend on what else is in its batch, bit for bit.

/// Columns of a panel of a packed matrix; also the lanes of every other sum.
pub const LANES: usize = 16;

/// Instruction sets that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// 512-bit vectors with sums of products of bytes (`vpdpbusd`).
    Avx512Vnni,
    /// 512-bit vectors.
    Avx512,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// The target's default.
    Portable,
}

/// Whether `mul_add` is one instruction on the target's default instruction set.
pub const PORTABLE_FMA: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

impl Isa {
    /// The best one that this machine has.
    pub fn detect() -> Self {
        *Self::available().first().unwrap_or(&Isa::Portable)
    }

    /// All that this machine has, best first.
    pub fn available() -> Vec<Self> {
        let mut out = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                if is_x86_feature_detected!("avx512vnni") {
                    out.push(Isa::Avx512Vnni);
                }
                out.push(Isa::Avx512);
            }
            if avx2 {
                out.push(Isa::Avx2);
            }
        }
        out.push(Isa::Portable);
        out
    }

    /// Rows of the largest tile of a product.
    pub fn tile_rows(self) -> usize {
        match self {
            Isa::Avx512Vnni | Isa::Avx512 => 14,
            Isa::Avx2 => 6,
            Isa::Portable => 4,
        }
    }
}

/// A multiply-add that is fused where that is one instruction.
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// e^x to about one unit in the last place, 0 below -87.3; Cephes' `expf` without branches.
#[inline(always)]
fn exp<const FMA: bool>(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to the nearest integer, which then sits in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.336_54, 88.376_26);
    let shifted = fma::<FMA>(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, 2.121_944_4e-4, fma::<FMA>(n, -0.693_359_4, clamped));
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5] {
        p = fma::<FMA>(p, r, c);
    }
    let y = fma::<FMA>(p, r * r, r) + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    if x < -87.336_54 { 0.0 } else { y * power }
}

/// Compiles one loop for each instruction set and picks at run time.
macro_rules! for_each_isa {
    ($(#[$doc:meta])* $seen:vis fn $name:ident($isa:ident; $($arg:ident: $type:ty),* $(,)?) $(-> $out:ty)? = $body:ident) => {
        $(#[$doc])*
        $seen fn $name($isa: Isa, $($arg: $type),*) $(-> $out)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
                fn avx512($($arg: $type),*) $(-> $out)? {
                    $body::<true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $type),*) $(-> $out)? {
                    $body::<true>($($arg),*)
                }
                match $isa {
                    // SAFETY: all but `Isa::Portable` come from `Isa::available`, which looked.
                    Isa::Avx512Vnni | Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    Isa::Portable => {}
                }
            }
            let _ = $isa;
            $body::<PORTABLE_FMA>($($arg),*)
        }
    };
}

pub(super) use for_each_isa;

for_each_isa! {
    /// RMSNorm of rows: `out = x / sqrt(mean(x^2) + eps) * weight`; all rows as wide as `weight`.
    pub fn rms_norm(isa; x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = rms_norm_body
}

#[inline(always)]
fn rms_norm_body<const FMA: bool>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let mut lanes = [0f32; LANES];
        let mut chunks = x.chunks_exact(LANES);
        for c in &mut chunks {
            for (s, v) in lanes.iter_mut().zip(c) {
                *s = fma::<FMA>(*v, *v, *s);
            }
        }
        for (s, v) in lanes.iter_mut().zip(chunks.remainder()) {
            *s = fma::<FMA>(*v, *v, *s);
        }
        let scale = 1.0 / (sum_lanes(&lanes) / width as f32 + eps).sqrt();
        for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
            *o = *v * scale * *w;
        }
    }
}

for_each_isa! {
    /// SwiGLU: rows `[gate | up]` of `2 width` become rows `silu(gate) * up` of `width`.
    pub fn swiglu(isa; gate_up: &[f32], width: usize, out: &mut [f32]) = swiglu_body
}

#[inline(always)]
fn swiglu_body<const FMA: bool>(gate_up: &[f32], width: usize, out: &mut [f32]) {
    for (row, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
        let (gate, up) = row.split_at(width);
        for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
            *o = *g / (1.0 + exp::<FMA>(-*g)) * *u;
        }
    }
}

for_each_isa! {
    /// Rotates the halves of each head of a row in place; `cos` and `sin` are `[head_dim / 2]`.
    pub fn rotate(isa; row: &mut [f32], cos: &[f32], sin: &[f32]) = rotate_body
}

#[inline(always)]
fn rotate_body<const FMA: bool>(row: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    for head in row.chunks_exact_mut(2 * half) {
        let (a, b) = head.split_at_mut(half);
        for ((a, b), (c, s)) in a.iter_mut().zip(b).zip(cos.iter().zip(sin)) {
            let (x, y) = (*a, *b);
            *a = x * *c - y * *s;
            *b = y * *c + x * *s;
        }
    }
}

for_each_isa! {
    /// Replaces scores by `exp(scale (score - max))` and gives back their sum.
    pub fn softmax_unscaled(isa; scores: &mut [f32], scale: f32) -> f32 = softmax_body
}

#[inline(always)]
fn softmax_body<const FMA: bool>(scores: &mut [f32], scale: f32) -> f32 {
    let max = max_body::<FMA>(scores);
    let mut lanes = [0f32; LANES];
    let mut chunks = scores.chunks_exact_mut(LANES);
    for c in &mut chunks {
        for (s, v) in lanes.iter_mut().zip(c) {
            *v = exp::<FMA>((*v - max) * scale);
            *s += *v;
        }
    }
    for (s, v) in lanes.iter_mut().zip(chunks.into_remainder()) {
        *v = exp::<FMA>((*v - max) * scale);
        *s += *v;
    }
    sum_lanes(&lanes)
}

for_each_isa! {
    /// The largest value; negative infinity where there is none.
    pub fn max(isa; values: &[f32]) -> f32 = max_body
}

#[inline(always)]
fn max_body<const FMA: bool>(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = values.chunks_exact(LANES);
    for c in &mut chunks {
        for (m, v) in lanes.iter_mut().zip(c) {
            *m = if *v > *m { *v } else { *m };
        }
    }
    for (m, v) in lanes.iter_mut().zip(chunks.remainder()) {
        *m = if *v > *m { *v } else { *m };
    }
    lanes.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b))
}

for_each_isa! {
    /// log(sum(exp(values))), summed in f64 over stretches of 16 lanes.
    pub fn log_sum_exp(isa; values: &[f32]) -> f64 = log_sum_exp_body
}

#[inline(always)]
fn log_sum_exp_body<const FMA: bool>(values: &[f32]) -> f64 {
    let max = max_body::<FMA>(values);
    let mut total = 0f64;
    for stretch in values.chunks(64 * LANES) {
        let mut lanes = [0f32; LANES];
        let mut chunks = stretch.chunks_exact(LANES);
        for c in &mut chunks {
            for (s, v) in lanes.iter_mut().zip(c) {
                *s += exp::<FMA>(*v - max);
            }
        }
        for (s, v) in lanes.iter_mut().zip(chunks.remainder()) {
            *s += exp::<FMA>(*v - max);
        }
        total += f64::from(sum_lanes(&lanes));
    }
    f64::from(max) + total.ln()
}

/// Sum of the lanes, as a tree.
#[inline(always)]
fn sum_lanes(lanes: &[f32; LANES]) -> f32 {
    let mut l = *lanes;
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            l[i] += l[i + n];
        }
        n /= 2;
    }
    l[0]
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Numbers in -1 .. 1 without a pattern.
    pub fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut x = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            x as f32 / u32::MAX as f32 * 2.0 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn exp_is_right_to_the_last_places() {
        for i in -8800..=880 {
            let x = i as f32 / 100.0;
            let (got, want) = (f64::from(exp::<true>(x)), f64::from(x).exp());
            if x < -87.33 {
                assert!(got < 2e-38);
            } else if x < 88.3 {
                assert!((got / want - 1.0).abs() < 3e-7, "exp({x}) = {got}, not {want}");
            }
        }
        assert_eq!(exp::<true>(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn loops_agree_on_every_instruction_set() {
        let (x, w) = (noise(3 * 50, 6), noise(50, 7));
        let scores = noise(77, 8);
        for isa in Isa::available() {
            let mut out = vec![0f32; 150];
            rms_norm(isa, &x, &w, 1e-5, &mut out);
            let mean: f64 = x[50..100].iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 50.0 + 1e-5;
            for i in 0..50 {
                assert!((f64::from(out[50 + i]) - f64::from(x[50 + i]) / mean.sqrt() * f64::from(w[i])).abs() < 1e-6);
            }
            let mut act = vec![0f32; 75];
            swiglu(isa, &x, 25, &mut act);
            let (g, u) = (f64::from(x[3]), f64::from(x[28]));
            assert!((f64::from(act[3]) - g / (1.0 + (-g).exp()) * u).abs() < 1e-6);

            let mut soft = scores.clone();
            let sum = softmax_unscaled(isa, &mut soft, 0.5);
            let top = scores.iter().copied().fold(f32::MIN, f32::max);
            let want: Vec<f64> = scores.iter().map(|s| (0.5 * f64::from(*s - top)).exp()).collect();
            assert!((f64::from(sum) - want.iter().sum::<f64>()).abs() < 1e-4);
            assert!((f64::from(soft[76]) - want[76]).abs() < 1e-6);

            let want = scores.iter().map(|s| f64::from(*s).exp()).sum::<f64>().ln();
            assert!((log_sum_exp(isa, &scores) - want).abs() < 1e-6);
        }
    }

    #[test]
    fn rotation_by_a_right_angle_swaps_halves() {
        let mut row = [1.0, 2.0, 3.0, 4.0];
        rotate(Isa::Portable, &mut row, &[0.0, 1.0], &[1.0, 0.0]);
        assert_eq!(row, [-3.0, 2.0, 1.0, 4.0]);
    }
}
