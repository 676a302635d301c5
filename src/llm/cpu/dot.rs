//! Sums of products of small integers, block by block, for CPU cores.
//!
//! In: rows of activations as integers and panels of weights as the integers of their file (both made by
//! `codes.rs`). Out: f32 rows. Within a block of 32 the sum is exact, in i32; blocks are added in f32, in the order
//! of k, one fused multiply-add after the other. So a row has the same bits whatever other rows are computed with it.
//!
//! Activations have 16 bits. With `vpdpbusd` they are held as a high and a low signed byte: the high bytes are summed, the sum is
//! shifted by 8, and the low bytes are added to it; with 8 bits there is no second pass. Elsewhere they are words of 16 bits.

use super::codes::BLOCK;
use super::kernels::{Isa, LANES, PORTABLE_FMA, fma};

/// Groups of four values of a block: what one instruction multiplies.
pub const QUADS: usize = BLOCK / 4;

/// The operands of a product of rows with panels of 16 columns.
///
/// Rows come in tiles of [`tile_rows`], the last one padded: `[tiles][blocks][parts][QUADS][tile rows][4]` bytes (one part of
/// 8 bits or two of 16, see [`Form`]) or `[tiles][blocks][QUADS][tile rows][4]` words, and
/// `[tiles][blocks][tile rows]` scales and sums. Panels: `[panels][blocks][QUADS][16][4]` bytes, and
/// `[panels][blocks][16]` scales and minima. Row `i` of the result starts at `c + i * c_stride`; panel `j` fills its columns
/// `16 j .. 16 j + 16`.
#[derive(Clone, Copy)]
pub struct Dot {
    /// Integers of the rows.
    pub quads: *const u8,
    /// What a row's integers of a block are multiplied by.
    pub row_scales: *const f32,
    /// With minima: the sum of a row's values of a block, f32. Without: what the sum of the products begins with, i32.
    pub row_sums: *const u32,
    /// Unsigned bytes of the panels.
    pub codes: *const u8,
    /// What a column's integers of a block are multiplied by.
    pub scales: *const f32,
    /// What is added to a column's values of a block; null where nothing is.
    pub minima: *const f32,
    /// Result.
    pub c: *mut f32,
    /// Distance of its rows.
    pub c_stride: usize,
    /// Rows.
    pub rows: usize,
    /// Panels.
    pub panels: usize,
    /// Blocks of a sum.
    pub blocks: usize,
    /// How the rows' integers are held; [`Form::of`] the instruction set.
    pub form: Form,
    /// Whether to add to what is in `c`.
    pub add: bool,
}

/// How integers of rows are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Signed bytes.
    Bytes,
    /// 16 bits: the high bytes of a block, then its low bytes; both signed.
    TwoBytes,
    /// 16 bits as they are.
    Words,
}

impl Form {
    /// What an instruction set multiplies.
    pub fn of(isa: Isa, wide: bool) -> Self {
        match (isa, wide) {
            (Isa::Avx512Vnni, true) => Form::TwoBytes,
            (Isa::Avx512Vnni, false) => Form::Bytes,
            _ => Form::Words,
        }
    }

    /// Bytes of a value.
    pub fn size(self) -> usize {
        match self {
            Form::Bytes => 1,
            Form::TwoBytes | Form::Words => 2,
        }
    }
}

/// Rows of a tile.
pub fn tile_rows(isa: Isa) -> usize {
    match isa {
        Isa::Avx512Vnni => 14,
        Isa::Avx512 | Isa::Avx2 | Isa::Portable => WORDS_TILE,
    }
}

/// Rows of a tile of words.
const WORDS_TILE: usize = 2;

/// Computes a product on this thread.
///
/// # Safety
/// Every row and panel that [`Dot`] describes must be readable (`c`: writable), panels aligned to 64 bytes, the form must be that
/// of the instruction set, and nothing else may use the written columns meanwhile.
pub unsafe fn dot(isa: Isa, p: Dot) {
    // SAFETY: the caller's promise; and the instruction set comes from `Isa::available`.
    unsafe {
        match (isa, p.form) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Vnni, Form::TwoBytes) => vnni::dot_wide(p),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Vnni, _) => vnni::dot_narrow(p),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512 | Isa::Avx2, _) => avx2::dot_words(p),
            _ => dot_portable(p),
        }
    }
}

/// As [`dot`] for weights that are words too: panels are `[panels][blocks][2 QUADS][16][2]` words without minima, rows come in
/// [`Form::Words`] and tiles of [`tile_rows`] of VNNI, and all integers are at most 8,000 in magnitude.
///
/// # Safety
/// As [`dot`]; the machine must have VNNI.
#[cfg(target_arch = "x86_64")]
pub unsafe fn dot_of_words(p: Dot) {
    // SAFETY: the caller's promise.
    unsafe { vnni::dot_of_words(p) }
}

/// Plain loops in the same order.
unsafe fn dot_portable(p: Dot) {
    for panel in 0..p.panels {
        for row in 0..p.rows {
            // SAFETY: the caller's promise, row by row.
            unsafe {
                let first = (row / WORDS_TILE) * p.blocks;
                let mut total = [0f32; LANES];
                for block in 0..p.blocks {
                    let words = p.quads.cast::<[i16; 4]>();
                    let words = words.add((first + block) * QUADS * WORDS_TILE + row % WORDS_TILE);
                    let at = (panel * p.blocks + block) * LANES;
                    let mut sums = [0i32; LANES];
                    for quad in 0..QUADS {
                        let a = words.add(quad * WORDS_TILE).read_unaligned();
                        let w: &[[u8; 4]; LANES] = &*p.codes.add(at * BLOCK + quad * LANES * 4).cast();
                        for (s, w) in sums.iter_mut().zip(w) {
                            *s += a.iter().zip(w).map(|(a, w)| i32::from(*a) * i32::from(*w)).sum::<i32>();
                        }
                    }
                    let of_row = (first + block) * WORDS_TILE + row % WORDS_TILE;
                    let (scale, sum) = (*p.row_scales.add(of_row), *p.row_sums.add(of_row));
                    let scales: &[f32; LANES] = &*p.scales.add(at).cast();
                    if p.minima.is_null() {
                        sums.iter_mut().for_each(|s| *s += sum as i32);
                    }
                    for ((t, s), d) in total.iter_mut().zip(&sums).zip(scales) {
                        *t = fma::<PORTABLE_FMA>(*s as f32, *d * scale, *t);
                    }
                    if !p.minima.is_null() {
                        let minima: &[f32; LANES] = &*p.minima.add(at).cast();
                        for (t, m) in total.iter_mut().zip(minima) {
                            *t = fma::<PORTABLE_FMA>(*m, f32::from_bits(sum), *t);
                        }
                    }
                }
                let c: &mut [f32; LANES] = &mut *p.c.add(row * p.c_stride + panel * LANES).cast();
                for (c, t) in c.iter_mut().zip(&total) {
                    *c = if p.add { *c + *t } else { *t };
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    //! `vpmaddwd` on 256 bits: two rows by one panel, eight registers of i32 sums of pairs and four of f32 sums.

    use std::arch::x86_64::*;

    use super::{BLOCK, Dot, LANES, QUADS, WORDS_TILE as TILE};

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn dot_words(p: Dot) {
        for panel in 0..p.panels {
            for row in (0..p.rows).step_by(TILE) {
                // SAFETY: the caller's promise, tile by tile.
                unsafe { if p.rows - row == 1 { tile::<1>(p, row, panel) } else { tile::<TILE>(p, row, panel) } }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn tile<const ROWS: usize>(p: Dot, row: usize, panel: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let first = row / TILE * p.blocks;
            let mut total = [[_mm256_setzero_ps(); 2]; ROWS];
            for block in 0..p.blocks {
                let words = p.quads.add((first + block) * BLOCK * TILE * 2);
                let at = (panel * p.blocks + block) * LANES;
                let codes = p.codes.add(at * BLOCK);
                // Register q: columns 4 q .. 4 q + 4, two sums of pairs each.
                let mut sums = [[_mm256_setzero_si256(); 4]; ROWS];
                for quad in 0..QUADS {
                    let mut a = [_mm256_setzero_si256(); ROWS];
                    for (r, a) in a.iter_mut().enumerate() {
                        *a = _mm256_set1_epi64x(words.add((quad * TILE + r) * 8).cast::<i64>().read_unaligned());
                    }
                    for q in 0..4 {
                        let w = _mm256_cvtepu8_epi16(_mm_load_si128(codes.add(quad * 64 + q * 16).cast()));
                        for (sums, a) in sums.iter_mut().zip(&a) {
                            sums[q] = _mm256_add_epi32(sums[q], _mm256_madd_epi16(w, *a));
                        }
                    }
                }
                for (r, (total, sums)) in total.iter_mut().zip(&sums).enumerate() {
                    let of_row = (first + block) * TILE + r;
                    let scale = _mm256_set1_ps(*p.row_scales.add(of_row));
                    let sum = *p.row_sums.add(of_row);
                    for (half, t) in total.iter_mut().enumerate() {
                        // Sums of pairs become sums, and come back into the order of the columns.
                        let s = _mm256_hadd_epi32(sums[2 * half], sums[2 * half + 1]);
                        let mut s = _mm256_permute4x64_epi64::<0b11_01_10_00>(s);
                        if p.minima.is_null() {
                            s = _mm256_add_epi32(s, _mm256_set1_epi32(sum as i32));
                        }
                        let d = _mm256_mul_ps(_mm256_loadu_ps(p.scales.add(at + 8 * half)), scale);
                        *t = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s), d, *t);
                        if !p.minima.is_null() {
                            let m = _mm256_loadu_ps(p.minima.add(at + 8 * half));
                            *t = _mm256_fmadd_ps(m, _mm256_set1_ps(f32::from_bits(sum)), *t);
                        }
                    }
                }
            }
            for (r, t) in total.iter().enumerate() {
                for (half, t) in t.iter().enumerate() {
                    let c = p.c.add((row + r) * p.c_stride + panel * LANES + half * 8);
                    let t = if p.add { _mm256_add_ps(*t, _mm256_loadu_ps(c)) } else { *t };
                    _mm256_storeu_ps(c, t);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod vnni {
    //! `vpdpbusd` on 512 bits: 14 rows by one panel, 14 registers of i32 sums and 14 of f32 sums. A row's four bytes are
    //! broadcast from memory within the instruction, so that nothing but the products takes the multipliers.

    use std::arch::x86_64::*;

    use super::{BLOCK, Dot, LANES, QUADS};

    const TILE: usize = 14;

    /// Bytes of a row tile's block.
    const fn tile_bytes(wide: bool) -> usize {
        BLOCK * TILE * if wide { 2 } else { 1 }
    }

    macro_rules! tiles {
        ($name:ident, $tile:ident, $wide:literal) => {
            #[target_feature(enable = "avx512f,avx512vl,avx512vnni,avx2,fma")]
            pub unsafe fn $name(p: Dot) {
                for panel in 0..p.panels {
                    let mut row = 0;
                    while row < p.rows {
                        // SAFETY: the caller's promise, tile by tile.
                        unsafe {
                            match p.rows - row {
                                1 => $tile::<1, $wide>(p, row, panel),
                                2 => $tile::<2, $wide>(p, row, panel),
                                3 => $tile::<3, $wide>(p, row, panel),
                                4 => $tile::<4, $wide>(p, row, panel),
                                5 => $tile::<5, $wide>(p, row, panel),
                                6 => $tile::<6, $wide>(p, row, panel),
                                7 => $tile::<7, $wide>(p, row, panel),
                                8 => $tile::<8, $wide>(p, row, panel),
                                9 => $tile::<9, $wide>(p, row, panel),
                                10 => $tile::<10, $wide>(p, row, panel),
                                11 => $tile::<11, $wide>(p, row, panel),
                                12 => $tile::<12, $wide>(p, row, panel),
                                13 => $tile::<13, $wide>(p, row, panel),
                                _ => $tile::<TILE, $wide>(p, row, panel),
                            }
                        }
                        row += TILE;
                    }
                }
            }
        };
    }
    tiles!(dot_wide, tile, true);
    tiles!(dot_narrow, tile, false);
    tiles!(dot_of_words, tile_of_words, true);

    /// Words by words: `vpdpwssd`, two products a lane.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512vnni,avx2,fma")]
    unsafe fn tile_of_words<const ROWS: usize, const WIDE: bool>(p: Dot, row: usize, panel: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let first = row / TILE * p.blocks;
            let mut words = p.quads.add(first * tile_bytes(WIDE));
            let mut row_scales = p.row_scales.add(first * TILE);
            let at = panel * p.blocks * LANES;
            let mut weights = p.codes.add(at * BLOCK * 2);
            let mut scales = p.scales.add(at);
            let mut total = [_mm512_setzero_ps(); ROWS];
            for _ in 0..p.blocks {
                let mut sums = [_mm512_setzero_si512(); ROWS];
                for pair in 0..2 * QUADS {
                    let w = _mm512_load_si512(weights.add(pair * 64).cast());
                    for (r, s) in sums.iter_mut().enumerate() {
                        let a = words.add((pair / 2 * TILE + r) * 8 + pair % 2 * 4).cast::<i32>().read_unaligned();
                        *s = _mm512_dpwssd_epi32(*s, w, _mm512_set1_epi32(a));
                    }
                }
                let d = _mm512_load_ps(scales);
                for (r, (t, s)) in total.iter_mut().zip(&sums).enumerate() {
                    let scale = _mm512_mul_ps(d, _mm512_set1_ps(*row_scales.add(r)));
                    *t = _mm512_fmadd_ps(_mm512_cvtepi32_ps(*s), scale, *t);
                }
                weights = weights.add(BLOCK * LANES * 2);
                scales = scales.add(LANES);
                words = words.add(tile_bytes(WIDE));
                row_scales = row_scales.add(TILE);
            }
            for (r, t) in total.iter().enumerate() {
                let c = p.c.add((row + r) * p.c_stride + panel * LANES);
                let t = if p.add { _mm512_add_ps(*t, _mm512_loadu_ps(c)) } else { *t };
                _mm512_storeu_ps(c, t);
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512vnni,avx2,fma")]
    unsafe fn tile<const ROWS: usize, const WIDE: bool>(p: Dot, row: usize, panel: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let first = row / TILE * p.blocks;
            let mut quads = p.quads.add(first * tile_bytes(WIDE));
            let mut row_scales = p.row_scales.add(first * TILE);
            let mut row_sums = p.row_sums.add(first * TILE);
            let at = panel * p.blocks * LANES;
            let mut codes = p.codes.add(at * BLOCK);
            let mut scales = p.scales.add(at);
            let mut minima = p.minima.wrapping_add(at);
            let affine = !p.minima.is_null();
            let mut total = [_mm512_setzero_ps(); ROWS];
            for _ in 0..p.blocks {
                let mut sums = [_mm512_setzero_si512(); ROWS];
                for quad in 0..QUADS {
                    let w = _mm512_load_si512(codes.add(quad * 64).cast());
                    for (r, s) in sums.iter_mut().enumerate() {
                        let a = quads.add((quad * TILE + r) * 4).cast::<i32>().read_unaligned();
                        *s = _mm512_dpbusd_epi32(*s, w, _mm512_set1_epi32(a));
                    }
                }
                if WIDE {
                    for s in &mut sums {
                        *s = _mm512_slli_epi32::<8>(*s);
                    }
                    for quad in 0..QUADS {
                        let w = _mm512_load_si512(codes.add(quad * 64).cast());
                        for (r, s) in sums.iter_mut().enumerate() {
                            let a = quads.add(((QUADS + quad) * TILE + r) * 4).cast::<i32>().read_unaligned();
                            *s = _mm512_dpbusd_epi32(*s, w, _mm512_set1_epi32(a));
                        }
                    }
                }
                let d = _mm512_load_ps(scales);
                if affine {
                    let m = _mm512_load_ps(minima);
                    for (r, (t, s)) in total.iter_mut().zip(&sums).enumerate() {
                        let scale = _mm512_mul_ps(d, _mm512_set1_ps(*row_scales.add(r)));
                        *t = _mm512_fmadd_ps(_mm512_cvtepi32_ps(*s), scale, *t);
                        let sum = _mm512_set1_ps(f32::from_bits(*row_sums.add(r)));
                        *t = _mm512_fmadd_ps(m, sum, *t);
                    }
                    minima = minima.add(LANES);
                } else {
                    for (r, (t, s)) in total.iter_mut().zip(&sums).enumerate() {
                        let scale = _mm512_mul_ps(d, _mm512_set1_ps(*row_scales.add(r)));
                        let s = _mm512_add_epi32(*s, _mm512_set1_epi32(*row_sums.add(r) as i32));
                        *t = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s), scale, *t);
                    }
                }
                codes = codes.add(BLOCK * LANES);
                scales = scales.add(LANES);
                quads = quads.add(tile_bytes(WIDE));
                row_scales = row_scales.add(TILE);
                row_sums = row_sums.add(TILE);
            }
            for (r, t) in total.iter().enumerate() {
                let c = p.c.add((row + r) * p.c_stride + panel * LANES);
                let t = if p.add { _mm512_add_ps(*t, _mm512_loadu_ps(c)) } else { *t };
                _mm512_storeu_ps(c, t);
            }
        }
    }
}
