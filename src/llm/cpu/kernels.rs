//! The arithmetic of the CPU path: f32 matrix products on packed weights, and the loops between them.
//!
//! One source for three instruction sets, chosen at run time: AVX-512, AVX2 with FMA, and
//! whatever the target has by default. Every sum has one order, whatever the instruction
//! set, the number of rows of a call or the number of threads: a product accumulates over k
//! in a single chain of fused multiply-adds per output, other sums go into 16 lanes by index. So a prompt's
//! logits do not depend on what else is in its batch, bit for bit.

/// Columns of a panel of a packed matrix; also the lanes of every other sum.
pub const LANES: usize = 16;

/// Instruction sets that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// 512-bit vectors.
    Avx512,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// The target's default.
    Portable,
}

/// Whether `mul_add` is one instruction on the target's default instruction set.
const PORTABLE_FMA: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

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
            Isa::Avx512 => 14,
            Isa::Avx2 => 6,
            Isa::Portable => 4,
        }
    }
}

/// A multiply-add that is fused where that is one instruction.
#[inline(always)]
fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
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
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.000_000_1e-1] {
        p = fma::<FMA>(p, r, c);
    }
    let y = fma::<FMA>(p, r * r, r) + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    if x < -87.336_54 { 0.0 } else { y * power }
}

/// Compiles one loop for each instruction set and picks at run time.
macro_rules! for_each_isa {
    ($(#[$doc:meta])* pub fn $name:ident($isa:ident; $($arg:ident: $type:ty),* $(,)?) $(-> $out:ty)? = $body:ident) => {
        $(#[$doc])*
        pub fn $name($isa: Isa, $($arg: $type),*) $(-> $out)? {
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
                    // SAFETY: `Isa::Avx512` and `Isa::Avx2` come from `Isa::available`, which looked.
                    Isa::Avx512 => return unsafe { avx512($($arg),*) },
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

/// The operands of a product of a few rows with panels of a packed matrix.
///
/// Row `i` of the left side starts at `a + i * a_stride` and has `k` values. Panel `j` starts
/// at `b + j * b_stride` and has `k` rows of 16. Row `i` of the result starts at `c + i * c_stride`; panel `j`
/// fills its columns `16 j .. 16 j + 16`.
#[derive(Clone, Copy)]
pub struct Product {
    /// Left side.
    pub a: *const f32,
    /// Distance of its rows.
    pub a_stride: usize,
    /// Packed right side.
    pub b: *const f32,
    /// Distance of its panels.
    pub b_stride: usize,
    /// Result.
    pub c: *mut f32,
    /// Distance of its rows.
    pub c_stride: usize,
    /// Rows.
    pub rows: usize,
    /// Panels.
    pub panels: usize,
    /// Length of a sum.
    pub k: usize,
    /// Whether to add to what is in `c`.
    pub add: bool,
}

/// Computes a product on this thread.
///
/// # Safety
/// Every row and panel that [`Product`] describes must be readable (`c`: writable), and nothing
/// else may use the written columns meanwhile.
pub unsafe fn product(isa: Isa, p: Product) {
    // SAFETY: the caller's promise; and the instruction set comes from `Isa::available`.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::product_avx512(p),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::product_avx2(p),
            _ => product_portable(p),
        }
    }
}

/// Runs `tile::<ROWS>` down the rows, the last ones with fewer.
macro_rules! rows_in_tiles {
    ($p:ident, $largest:literal, [$($n:literal),*], $tile:ident, $b:expr, $column:expr) => {{
        let mut row = 0;
        while row < $p.rows {
            let left = $p.rows - row;
            let a = $p.a.add(row * $p.a_stride);
            let c = $p.c.add(row * $p.c_stride);
            match left {
                $($n => $tile::<$n>($p, a, c, $b, $column),)*
                _ => $tile::<$largest>($p, a, c, $b, $column),
            }
            row += left.min($largest);
        }
    }};
}

/// Panels outside, rows inside: a panel stays in the second-level cache while the rows pass.
unsafe fn product_portable(p: Product) {
    for panel in 0..p.panels {
        // SAFETY: the caller's promise, panel by panel.
        unsafe {
            let b = p.b.add(panel * p.b_stride);
            rows_in_tiles!(p, 4, [1, 2, 3], tile_portable, b, panel * LANES);
        }
    }
}

#[inline(always)]
unsafe fn tile_portable<const ROWS: usize>(p: Product, a: *const f32, c: *mut f32, b: *const f32, column: usize) {
    let mut sums = [[0f32; LANES]; ROWS];
    // SAFETY: the caller's promise.
    unsafe {
        for i in 0..p.k {
            let b: &[f32; LANES] = &*b.add(i * LANES).cast();
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = *a.add(r * p.a_stride + i);
                for (s, b) in sums.iter_mut().zip(b) {
                    *s = fma::<PORTABLE_FMA>(x, *b, *s);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let c: &mut [f32; LANES] = &mut *c.add(r * p.c_stride + column).cast();
            for (c, s) in c.iter_mut().zip(sums) {
                *c = if p.add { *c + *s } else { *s };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The tiles in `std::arch`: 14 rows by 32 columns (28 of 32 registers hold sums), and 6 by 16
    //! (12 of 16). Both reach the machine's peak when a panel is in the second-level cache.

    use std::arch::x86_64::*;

    use super::{LANES, Product};

    #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
    pub unsafe fn product_avx512(p: Product) {
        let mut panel = 0;
        while panel < p.panels {
            // SAFETY: the caller's promise, panel by panel.
            unsafe {
                let b = p.b.add(panel * p.b_stride);
                if panel + 2 <= p.panels {
                    rows_in_tiles!(p, 14, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], two_panels, b, panel * LANES);
                } else {
                    rows_in_tiles!(p, 14, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], one_panel, b, panel * LANES);
                }
            }
            panel += 2;
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
    unsafe fn two_panels<const ROWS: usize>(p: Product, a: *const f32, c: *mut f32, b: *const f32, column: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let b1 = b.add(p.b_stride);
            let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
            for i in 0..p.k {
                let x0 = _mm512_loadu_ps(b.add(i * LANES));
                let x1 = _mm512_loadu_ps(b1.add(i * LANES));
                for (r, s) in sums.iter_mut().enumerate() {
                    let v = _mm512_set1_ps(*a.add(r * p.a_stride + i));
                    s[0] = _mm512_fmadd_ps(v, x0, s[0]);
                    s[1] = _mm512_fmadd_ps(v, x1, s[1]);
                }
            }
            for (r, s) in sums.iter().enumerate() {
                for (half, s) in s.iter().enumerate() {
                    let c = c.add(r * p.c_stride + column + half * LANES);
                    let s = if p.add { _mm512_add_ps(*s, _mm512_loadu_ps(c)) } else { *s };
                    _mm512_storeu_ps(c, s);
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
    unsafe fn one_panel<const ROWS: usize>(p: Product, a: *const f32, c: *mut f32, b: *const f32, column: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [_mm512_setzero_ps(); ROWS];
            for i in 0..p.k {
                let x = _mm512_loadu_ps(b.add(i * LANES));
                for (r, s) in sums.iter_mut().enumerate() {
                    *s = _mm512_fmadd_ps(_mm512_set1_ps(*a.add(r * p.a_stride + i)), x, *s);
                }
            }
            for (r, s) in sums.iter().enumerate() {
                let c = c.add(r * p.c_stride + column);
                let s = if p.add { _mm512_add_ps(*s, _mm512_loadu_ps(c)) } else { *s };
                _mm512_storeu_ps(c, s);
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn product_avx2(p: Product) {
        for panel in 0..p.panels {
            // SAFETY: the caller's promise, panel by panel.
            unsafe {
                let b = p.b.add(panel * p.b_stride);
                rows_in_tiles!(p, 6, [1, 2, 3, 4, 5], half_panels, b, panel * LANES);
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn half_panels<const ROWS: usize>(p: Product, a: *const f32, c: *mut f32, b: *const f32, column: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
            for i in 0..p.k {
                let x0 = _mm256_loadu_ps(b.add(i * LANES));
                let x1 = _mm256_loadu_ps(b.add(i * LANES + 8));
                for (r, s) in sums.iter_mut().enumerate() {
                    let v = _mm256_set1_ps(*a.add(r * p.a_stride + i));
                    s[0] = _mm256_fmadd_ps(v, x0, s[0]);
                    s[1] = _mm256_fmadd_ps(v, x1, s[1]);
                }
            }
            for (r, s) in sums.iter().enumerate() {
                for (half, s) in s.iter().enumerate() {
                    let c = c.add(r * p.c_stride + column + half * 8);
                    let s = if p.add { _mm256_add_ps(*s, _mm256_loadu_ps(c)) } else { *s };
                    _mm256_storeu_ps(c, s);
                }
            }
        }
    }
}

/// A weight matrix in panels of 16 output columns: `[columns / 16][k][16]`, padded with zeros.
pub struct Packed {
    /// Length of a sum: the input width.
    pub k: usize,
    /// Output columns.
    pub columns: usize,
    data: Vec<f32>,
}

impl Packed {
    /// Packs matrices of `[rows, k]` (Hugging Face's `[out, in]`) below each other.
    pub fn pack(matrices: &[&[f32]], k: usize) -> Self {
        let columns = matrices.iter().map(|m| m.len()).sum::<usize>() / k;
        let panels = columns.div_ceil(LANES);
        let mut data = vec![0f32; panels * k * LANES];
        let rows = matrices.iter().flat_map(|m| m.chunks_exact(k));
        for (r, row) in rows.enumerate() {
            let panel = &mut data[(r / LANES) * k * LANES..];
            for (i, v) in row.iter().enumerate() {
                panel[i * LANES + r % LANES] = *v;
            }
        }
        Packed { k, columns, data }
    }

    /// Panels of 16 columns.
    pub fn panels(&self) -> usize {
        self.columns.div_ceil(LANES)
    }

    /// Copies output column `column` (a row of the matrix as it came) to `out`, `[k]`.
    pub fn unpack_row(&self, column: usize, out: &mut [f32]) {
        let panel = &self.data[(column / LANES) * self.k * LANES..];
        for (i, o) in out.iter_mut().enumerate() {
            *o = panel[i * LANES + column % LANES];
        }
    }

    /// `c = a W` (or `c += a W`) for rows of `a` that are `k` wide and rows of `c` that are
    /// `16 panels` wide; on this thread.
    pub fn multiply(&self, isa: Isa, a: &[f32], c: &mut [f32], add: bool) {
        let width = self.panels() * LANES;
        let rows = a.len() / self.k;
        assert!(a.len() == rows * self.k && c.len() == rows * width, "a product's rows fit each other");
        let p = Product {
            a: a.as_ptr(),
            a_stride: self.k,
            b: self.data.as_ptr(),
            b_stride: self.k * LANES,
            c: c.as_mut_ptr(),
            c_stride: width,
            rows,
            panels: self.panels(),
            k: self.k,
            add,
        };
        // SAFETY: the lengths were checked above, `data` holds all panels, and `c` is borrowed mutably.
        unsafe { product(isa, p) }
    }

    /// As [`Packed::multiply`] for a few of the panels, into rows of `c` that are `16 panels.len()` wide.
    pub fn multiply_panels(&self, isa: Isa, a: &[f32], panels: std::ops::Range<usize>, c: &mut [f32]) {
        let width = panels.len() * LANES;
        let rows = a.len() / self.k;
        assert!(panels.end <= self.panels(), "panels are within the matrix");
        assert!(a.len() == rows * self.k && c.len() == rows * width, "a product's rows fit each other");
        let p = Product {
            a: a.as_ptr(),
            a_stride: self.k,
            b: self.data[panels.start * self.k * LANES..].as_ptr(),
            b_stride: self.k * LANES,
            c: c.as_mut_ptr(),
            c_stride: width,
            rows,
            panels: panels.len(),
            k: self.k,
            add: false,
        };
        // SAFETY: the lengths were checked above, and `c` is borrowed mutably.
        unsafe { product(isa, p) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers in -1 .. 1 without a pattern.
    fn noise(n: usize, seed: u32) -> Vec<f32> {
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
    fn products_agree_with_plain_sums_on_every_instruction_set() {
        for (rows, k, columns) in [(1, 7, 16), (3, 64, 40), (14, 33, 32), (31, 50, 48), (29, 5, 100)] {
            let (a, w) = (noise(rows * k, 1), noise(columns * k, 2));
            let packed = Packed::pack(&[&w], k);
            let width = packed.panels() * LANES;
            for isa in Isa::available() {
                let mut c = vec![1f32; rows * width];
                packed.multiply(isa, &a, &mut c, true);
                for r in 0..rows {
                    for n in 0..columns {
                        let want: f64 =
                            1.0 + (0..k).map(|i| f64::from(a[r * k + i]) * f64::from(w[n * k + i])).sum::<f64>();
                        let got = f64::from(c[r * width + n]);
                        assert!((got - want).abs() < 1e-4, "{isa:?} {rows}x{k}x{columns} at {r},{n}: {got} != {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_neighbours() {
        let (k, columns) = (96, 80);
        let (a, w) = (noise(20 * k, 3), noise(columns * k, 4));
        let packed = Packed::pack(&[&w], k);
        for isa in Isa::available() {
            let mut all = vec![0f32; 20 * columns];
            packed.multiply(isa, &a, &mut all, false);
            for r in 0..20 {
                let mut one = vec![0f32; columns];
                packed.multiply(isa, &a[r * k..(r + 1) * k], &mut one, false);
                assert_eq!(one, all[r * columns..(r + 1) * columns], "{isa:?} row {r}");
                let mut some = vec![0f32; 2 * LANES];
                packed.multiply_panels(isa, &a[r * k..(r + 1) * k], 3..5, &mut some);
                assert_eq!(some, one[3 * LANES..5 * LANES]);
            }
        }
    }

    #[test]
    fn packed_rows_come_back() {
        let w = noise(20 * 9, 5);
        let packed = Packed::pack(&[&w[..9 * 7], &w[9 * 7..]], 9);
        let mut row = vec![0f32; 9];
        for r in 0..20 {
            packed.unpack_row(r, &mut row);
            assert_eq!(row, w[r * 9..(r + 1) * 9]);
        }
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
