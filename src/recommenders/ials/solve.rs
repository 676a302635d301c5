//! One row's system by conjugate gradients, compiled for the widest vectors that the machine has. Sums are taken in
//! sixteen strands without fused operations, so every machine gets the same bits.

/// Steps after which a row is left as it is; from 0 with alpha 1000 some 150 are needed.
const MOST_STEPS: usize = 400;

/// Solves `(I + (alpha - 1) Z^T Z) w = alpha Z^T 1` with Z the rows `columns` of `z [rows, k]`; `w [k]` holds the
/// start and then the solution. Stops at a residual of `tolerance` times the right hand side.
pub fn row(z: &[f32], columns: &[u32], alpha: f32, tolerance: f32, w: &mut [f32]) {
    if columns.is_empty() {
        w.fill(0.0);
        return;
    }
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: AVX-512F was found on this machine.
            return unsafe { avx512(z, columns, alpha, tolerance, w) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: AVX2 was found on this machine.
            return unsafe { avx2(z, columns, alpha, tolerance, w) };
        }
    }
    conjugate_gradients(z, columns, alpha, tolerance, w);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512(z: &[f32], columns: &[u32], alpha: f32, tolerance: f32, w: &mut [f32]) {
    conjugate_gradients(z, columns, alpha, tolerance, w);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2(z: &[f32], columns: &[u32], alpha: f32, tolerance: f32, w: &mut [f32]) {
    conjugate_gradients(z, columns, alpha, tolerance, w);
}

#[inline(always)]
fn conjugate_gradients(z: &[f32], columns: &[u32], alpha: f32, tolerance: f32, w: &mut [f32]) {
    let k = w.len();
    let mut target = vec![0f32; k];
    for &column in columns {
        axpy(alpha, &z[column as usize * k..][..k], &mut target);
    }
    let small = f64::from(tolerance).powi(2) * dot(&target, &target);
    let apply = |v: &[f32], out: &mut [f32]| {
        out.copy_from_slice(v);
        for &column in columns {
            let row = &z[column as usize * k..][..k];
            axpy((alpha - 1.0) * dot(row, v) as f32, row, out);
        }
    };
    let mut image = vec![0f32; k];
    apply(w, &mut image);
    let mut residual: Vec<f32> = target.iter().zip(&image).map(|(t, i)| t - i).collect();
    let mut direction = residual.clone();
    let mut square = dot(&residual, &residual);
    for _ in 0..MOST_STEPS.min(2 * k + 8) {
        if square <= small {
            break;
        }
        apply(&direction, &mut image);
        let curvature = dot(&direction, &image);
        if curvature.is_nan() || curvature <= 0.0 {
            break;
        }
        let step = (square / curvature) as f32;
        axpy(step, &direction, w);
        axpy(-step, &image, &mut residual);
        let next = dot(&residual, &residual);
        let keep = (next / square) as f32;
        square = next;
        for (d, r) in direction.iter_mut().zip(&residual) {
            *d = r + keep * *d;
        }
    }
}

#[inline(always)]
fn axpy(factor: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += factor * x;
    }
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f64 {
    const LANES: usize = 16;
    let mut lanes = [0f32; LANES];
    let (a_full, b_full) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a_full.remainder().iter().zip(b_full.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_full.zip(b_full) {
        for lane in 0..LANES {
            lanes[lane] += x[lane] * y[lane];
        }
    }
    f64::from(lanes.iter().sum::<f32>() + rest)
}
