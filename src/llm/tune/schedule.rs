//! Learning rates and the order of the examples: functions of the step's number, so that a tuning that was stopped goes on alike.
//!
//! In: a step. Out: a rate; the examples of the step.

use rand::seq::SliceRandom;

use crate::recommenders::trainer::epoch_rng;

/// The learning rate of step `step` (0-based) of `steps`: `step / warmup` of the peak first, then half a cosine to 0
/// (transformers, `get_cosine_schedule_with_warmup`).
pub fn rate(peak: f64, step: usize, warmup: usize, steps: usize) -> f64 {
    if step < warmup {
        return peak * step as f64 / warmup as f64;
    }
    let done = (step - warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
    peak * 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos())
}

/// Steps that one pass over `examples` takes, at least one.
pub fn steps_of_epoch(examples: usize, batch: usize) -> usize {
    examples.div_ceil(batch.max(1)).max(1)
}

/// Which examples step `step` (0-based) learns from: each pass goes over all of them in an order of its own, drawn from the seed
/// and the pass's number. The last step of a pass may have fewer than `batch`.
pub fn examples_of(step: usize, examples: usize, batch: usize, seed: u64) -> Vec<usize> {
    let of_epoch = steps_of_epoch(examples, batch);
    let (epoch, place) = (step / of_epoch, step % of_epoch);
    let mut order: Vec<usize> = (0..examples).collect();
    order.shuffle(&mut epoch_rng(seed, epoch + 1));
    order.into_iter().skip(place * batch).take(batch).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_transformers() {
        let golden: serde_json::Value =
            serde_json::from_slice(&std::fs::read(super::super::golden::folder("tiny").join("golden.json")).unwrap())
                .unwrap();
        let schedule = &golden["cosine_schedule"];
        let number = |key: &str| schedule[key].as_f64().unwrap();
        let (peak, warmup, total) = (number("lr"), number("warmup") as usize, number("total") as usize);
        for (step, want) in schedule["lr_of_step"].as_array().unwrap().iter().enumerate() {
            let got = rate(peak, step, warmup, total);
            assert!((got - want.as_f64().unwrap()).abs() <= 1e-12, "step {step}: {got} is not {want}");
        }
        assert_eq!(rate(1.0, 0, 0, 10), 1.0);
        assert_eq!(rate(1.0, 10, 0, 10), 0.0);
        assert_eq!(rate(1.0, 3, 5, 5), 0.6);
    }

    #[test]
    fn every_pass_goes_over_all_examples_in_an_order_of_its_own() {
        let pass = |epoch: usize| -> Vec<usize> { (0..3).flat_map(|s| examples_of(epoch * 3 + s, 7, 3, 5)).collect() };
        let (first, second) = (pass(0), pass(1));
        assert_ne!(first, second);
        for mut pass in [first, second] {
            pass.sort_unstable();
            assert_eq!(pass, [0, 1, 2, 3, 4, 5, 6]);
        }
        assert_eq!(examples_of(2, 7, 3, 5).len(), 1);
        assert_ne!(examples_of(0, 7, 3, 5), examples_of(0, 7, 3, 6));
    }
}
