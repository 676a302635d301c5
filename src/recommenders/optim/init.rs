//! Initial weights: a function of the generator's state alone, the same on every device.

use rand::Rng;

/// Uniform in `[-bound, bound]`.
pub fn uniform(n: usize, bound: f32, rng: &mut impl Rng) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-bound..=bound)).collect()
}

/// Normal with mean 0 (Box and Muller).
pub fn normal(n: usize, deviation: f32, rng: &mut impl Rng) -> Vec<f32> {
    (0..n).map(|_| deviation * standard_normal(rng)).collect()
}

/// Normal with mean 0, cut off at two standard deviations.
pub fn truncated_normal(n: usize, deviation: f32, rng: &mut impl Rng) -> Vec<f32> {
    let mut draw = || loop {
        let x = standard_normal(rng);
        if x.abs() <= 2.0 {
            return x * deviation;
        }
    };
    (0..n).map(|_| draw()).collect()
}

/// Glorot and Bengio's uniform start for a matrix `[rows, cols]`.
pub fn xavier_uniform(rows: usize, cols: usize, rng: &mut impl Rng) -> Vec<f32> {
    uniform(rows * cols, (6.0 / (rows + cols).max(1) as f32).sqrt(), rng)
}

/// Glorot and Bengio's normal start for a matrix `[rows, cols]`.
pub fn xavier_normal(rows: usize, cols: usize, rng: &mut impl Rng) -> Vec<f32> {
    normal(rows * cols, (2.0 / (rows + cols).max(1) as f32).sqrt(), rng)
}

fn standard_normal(rng: &mut impl Rng) -> f32 {
    // 1 - u is in (0, 1], so the logarithm is finite.
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    (radius * (2.0 * std::f64::consts::PI * rng.random::<f64>()).cos()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn moments_and_bounds_are_as_asked() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let draws = normal(40_000, 0.5, &mut rng);
        let mean = draws.iter().sum::<f32>() / 40_000.0;
        let deviation = (draws.iter().map(|x| x * x).sum::<f32>() / 40_000.0).sqrt();
        assert!(mean.abs() < 0.01 && (deviation - 0.5).abs() < 0.01, "{mean} {deviation}");
        assert!(truncated_normal(10_000, 0.02, &mut rng).iter().all(|x| x.abs() <= 0.04));
        let bound = (6.0f32 / 30.0).sqrt();
        let draws = xavier_uniform(10, 20, &mut rng);
        assert!(draws.len() == 200 && draws.iter().all(|x| x.abs() <= bound));
        assert!(draws.iter().any(|x| *x > 0.8 * bound) && draws.iter().any(|x| *x < -0.8 * bound));
    }
}
