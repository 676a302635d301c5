//! Is one system better than another on the same users? The paired t-test (Student 1908).
//!
//! In: the per-user values of two systems. Out: the mean difference, t and the two-sided p.

use statrs::distribution::{ContinuousCDF, StudentsT};

/// A paired t-test of `system` less `baseline`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairedTest {
    /// Number of pairs.
    pub n: usize,
    /// Mean of the differences; 0 without a pair.
    pub mean_difference: f64,
    /// mean / (sd / sqrt(n)), sd with n - 1.
    pub t: Option<f64>,
    /// Probability of so large a |t| or a larger one with n - 1 degrees of freedom, were there
    /// no difference.
    pub p: Option<f64>,
}

/// Tests whether the mean of `system[u] - baseline[u]` differs from 0. Equal lengths.
///
/// Degenerate cases: where all differences are 0 (the LLM changed nothing) t is 0 and p is 1;
/// where they are all the same and not 0, or where there are fewer than two pairs, there is no
/// spread to measure them by, and t and p are `None`.
pub fn paired_t_test(system: &[f64], baseline: &[f64]) -> PairedTest {
    let d: Vec<f64> = system.iter().zip(baseline).map(|(s, b)| s - b).collect();
    let n = d.len();
    let mean = if n == 0 { 0.0 } else { d.iter().sum::<f64>() / n as f64 };
    let without = PairedTest { n, mean_difference: mean, t: None, p: None };
    if n < 2 {
        return without;
    }
    if d.iter().all(|&x| x == d[0]) {
        return if d[0] == 0.0 { PairedTest { t: Some(0.0), p: Some(1.0), ..without } } else { without };
    }
    let variance = d.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1) as f64;
    let t = mean / (variance / n as f64).sqrt();
    let p = StudentsT::new(0.0, 1.0, (n - 1) as f64).ok().map(|dist| (2.0 * dist.sf(t.abs())).min(1.0));
    PairedTest { t: Some(t), p, ..without }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    // With mpmath at 30 digits, d = a - b:
    // t = mean(d) / (sd(d) / sqrt(n)); nu = n - 1
    // p = betainc(nu / 2, 1 / 2, 0, nu / (nu + t^2), regularized=True)
    #[test]
    fn six_pairs() {
        let r = paired_t_test(&[1.0, 0.0, 0.5, 0.63, 0.0, 1.0], &[0.5, 0.0, 0.5, 0.43, 0.39, 0.5]);
        assert_eq!(r.n, 6);
        assert!((r.mean_difference - 0.135).abs() < 1e-12);
        assert!((r.t.unwrap() - 0.9686196045011366).abs() < 1e-9, "{r:?}");
        assert!((r.p.unwrap() - 0.3772217927722548).abs() < 1e-9, "{r:?}");
    }

    #[test]
    fn two_pairs_have_one_degree_of_freedom() {
        // Cauchy: d = (1, 3), mean 2, sd sqrt 2, t = 2; p = 1 - 2 atan(2) / pi.
        let r = paired_t_test(&[1.0, 3.0], &[0.0, 0.0]);
        assert!((r.t.unwrap() - 2.0).abs() < 1e-12);
        assert!((r.p.unwrap() - (1.0 - 2.0 * 2f64.atan() / std::f64::consts::PI)).abs() < 1e-9);
    }

    #[test]
    fn degenerate_cases() {
        let none = paired_t_test(&[], &[]);
        assert_eq!(none, PairedTest { n: 0, mean_difference: 0.0, t: None, p: None });
        let one = paired_t_test(&[1.0], &[0.0]);
        assert_eq!(one, PairedTest { n: 1, mean_difference: 1.0, t: None, p: None });
        let same = paired_t_test(&[0.3, 0.7, 0.1], &[0.3, 0.7, 0.1]);
        assert_eq!(same, PairedTest { n: 3, mean_difference: 0.0, t: Some(0.0), p: Some(1.0) });
        let shifted = paired_t_test(&[1.0, 1.0], &[0.5, 0.5]);
        assert_eq!(shifted, PairedTest { n: 2, mean_difference: 0.5, t: None, p: None });
    }

    proptest! {
        #[test]
        fn turning_the_systems_round_turns_the_sign(pairs in prop::collection::vec((0.0f64..1.0, 0.0f64..1.0), 2..40)) {
            let (a, b): (Vec<f64>, Vec<f64>) = pairs.into_iter().unzip();
            let (x, y) = (paired_t_test(&a, &b), paired_t_test(&b, &a));
            prop_assert_eq!(x.t.map(|t| -t), y.t);
            prop_assert_eq!(x.p, y.p);
            prop_assert!(x.p.is_none_or(|p| (0.0..=1.0).contains(&p)));
        }
    }
}
