//! Gradients apart from the step: summed over several losses, clipped, then applied.
//!
//! In: losses made from the [`Vars`] of some [`Params`]. Out: [`Gradients`], one per weight, and a step of them. A model
//! that reads its weights whole uses this; [`Params::step`] is for those that read rows.

use burn::backend::Autodiff;
use burn::tensor::backend::Backend;
use burn::tensor::{ElementConversion, Tensor};

use super::adam::{Adam, AdamBackend};
use super::params::{Params, Vars};
use crate::recommenders::saved::NamedTensor;

/// A gradient per weight; `None` where no loss reached the weight.
pub struct Gradients<B: Backend>(Vec<Option<Tensor<B, 1>>>);

impl<B: Backend> Params<B> {
    /// No gradients yet.
    pub fn no_gradients(&self) -> Gradients<B> {
        Gradients(self.list.iter().map(|_| None).collect())
    }

    /// Gradients as named tensors; zeros where there is none.
    pub fn named(&self, gradients: &Gradients<B>) -> Vec<NamedTensor> {
        let mut all = self.tensors();
        for (tensor, gradient) in all.iter_mut().zip(&gradients.0) {
            match gradient {
                None => tensor.values.fill(0.0),
                Some(g) => tensor.values = g.to_data().iter::<f32>().collect(),
            }
        }
        all
    }
}

impl<B: Backend> Gradients<B> {
    /// Adds the gradients of `loss` at the weights that it read whole, and gives those at `leaves`, tensors that are
    /// none of the weights.
    pub fn add<const D: usize>(
        &mut self,
        loss: Tensor<Autodiff<B>, 1>,
        vars: &Vars<Autodiff<B>>,
        leaves: &[Tensor<Autodiff<B>, D>],
    ) -> Vec<Option<Tensor<B, D>>> {
        let mut grads = loss.backward();
        for (sum, (_, leaf)) in self.0.iter_mut().zip(&vars.list) {
            if let Some(grad) = leaf.grad_remove(&mut grads) {
                *sum = Some(match sum.take() {
                    None => grad,
                    Some(sum) => sum + grad,
                });
            }
        }
        leaves.iter().map(|leaf| leaf.grad_remove(&mut grads)).collect()
    }

    /// The norm of all together.
    pub fn norm(&self) -> f64 {
        let mut sum = 0.0f64;
        for gradient in self.0.iter().flatten() {
            sum += gradient.clone().powi_scalar(2).sum().into_scalar().elem::<f64>();
        }
        sum.sqrt()
    }
}

impl<B: AdamBackend> Params<B> {
    /// One step of Adam; gives the norm of the gradients before they were clipped.
    ///
    /// # Panics
    /// When the gradients are of other weights (our bug).
    pub fn apply(&mut self, gradients: Gradients<B>, adam: &Adam) -> f64 {
        assert_eq!(gradients.0.len(), self.list.len(), "gradients of other weights");
        self.steps += 1;
        let norm = gradients.norm();
        // As torch's `clip_grad_norm_`.
        let scale = adam.clip_norm.map(|limit| limit / (norm + 1e-6)).filter(|scale| *scale < 1.0);
        let steps = self.steps;
        for (param, gradient) in self.list.iter_mut().zip(gradients.0) {
            if let Some(gradient) = gradient {
                let step = Adam { rate: adam.rate * param.rate, ..*adam }.step(steps);
                let gradient = match scale {
                    None => gradient,
                    Some(scale) => gradient * scale as f32,
                };
                param.update(|state| B::adam(state, gradient, step));
            }
        }
        norm
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;

    fn weights() -> (Params<Flex>, super::super::ParamId) {
        let mut params = Params::<Flex>::new(&Default::default());
        let id = params.add("w", &[3], vec![0.5, -1.0, 2.0]);
        params.add("unread", &[1], vec![7.0]);
        (params, id)
    }

    #[test]
    fn two_halves_make_the_step_of_the_whole() {
        for clip_norm in [None, Some(0.5), Some(1e3)] {
            let adam = Adam { clip_norm, decay: 0.1, ..Adam::new(0.1) };
            let (mut whole, w) = weights();
            let (mut halves, _) = weights();
            for _ in 0..3 {
                let vars = whole.tracked();
                let x = vars.get::<1>(w);
                whole.step((x.clone().powi_scalar(2) + x).sum(), vars, &adam);
                let mut sum = halves.no_gradients();
                let vars = halves.tracked();
                sum.add::<1>(vars.get::<1>(w).powi_scalar(2).sum(), &vars, &[]);
                let vars = halves.tracked();
                sum.add::<1>(vars.get::<1>(w).sum(), &vars, &[]);
                halves.apply(sum, &adam);
            }
            let (a, b) = (whole.tensors(), halves.tensors());
            for (x, y) in a.iter().zip(&b).flat_map(|(a, b)| a.values.iter().zip(&b.values)) {
                assert!((x - y).abs() < 1e-6, "{x} is not {y}");
            }
            // Not reached by the loss: neither decayed nor moved.
            assert_eq!(a[1].values, [7.0]);
        }
    }
}
