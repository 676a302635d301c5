//! Loops compiled for several instruction sets, the widest of which is chosen at run time.
//!
//! In: a [`Work`], a loop that the compiler can turn into vector code. Out: what it gives.

/// A loop; `run` must be `#[inline(always)]`, and so must be what it calls.
pub trait Work {
    /// What it gives.
    type Output;

    /// Does it. `FMA` says that [`multiply_add`] is one instruction.
    fn run<const FMA: bool>(self) -> Self::Output;
}

/// `a * b + c`, in one instruction or in two.
#[inline(always)]
pub fn multiply_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Does `work` with AVX-512, AVX2, or what every machine has.
#[inline]
pub fn widest<W: Work>(work: W) -> W::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("fma") {
            // SAFETY: just checked.
            return unsafe { avx512(work) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: just checked.
            return unsafe { avx2(work) };
        }
    }
    work.run::<false>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn avx512<W: Work>(work: W) -> W::Output {
    work.run::<true>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<W: Work>(work: W) -> W::Output {
    work.run::<true>()
}
