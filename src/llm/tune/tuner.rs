//! One model in training: losses and gradients of packed examples, with all weights learned or those of an adapter.
//!
//! In: a [`Decoder`] with its weights, perhaps an [`Adapter`] with its own; [`Batch`]es. Out: sums of losses and
//! [`Gradients`] of what is learned.
//!
//! With `recompute` only the inputs of the layers are kept, and each layer is computed again when its gradient's turn
//! comes (Chen et al. 2016, arXiv 1604.06174): a third more work for a twentieth of the memory that activations take.

use burn::backend::Autodiff;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use super::decoder::{AdapterReads, Decoder, Packed, Reads};
use super::examples::Batch;
use super::lora::Adapter;
use crate::device::ModelBackend;
use crate::recommenders::optim::{Gradients, Params, Vars};

/// A model and what of it is learned.
pub struct Tuner<B: Backend> {
    /// The model's shape.
    pub decoder: Decoder,
    /// The model's own weights.
    pub base: Params<B>,
    /// The adapter, where one is learned and the model's own weights are not.
    pub adapter: Option<(Adapter, Params<B>)>,
    /// Share of the adapter's inputs that is dropped in training, in `[0, 1)`.
    pub dropout: f32,
    /// Whether layers are computed again for their gradients.
    pub recompute: bool,
}

/// The weights of one pass.
struct Pass<B: Backend> {
    base: Vars<B>,
    adapter: Option<Vars<B>>,
}

impl<B: Backend> Pass<B> {
    fn reads<'a>(&'a self, adapter: Option<&'a Adapter>, dropout: (f32, u64)) -> Reads<'a, B> {
        let adapter = adapter.zip(self.adapter.as_ref());
        let adapter = adapter.map(|(adapter, vars)| AdapterReads { adapter, vars, dropout });
        Reads { base: &self.base, learn_base: adapter.is_none(), adapter }
    }

    fn learned(&self) -> &Vars<B> {
        self.adapter.as_ref().unwrap_or(&self.base)
    }
}

impl<B: ModelBackend> Tuner<B> {
    /// What is learned.
    pub fn learned(&self) -> &Params<B> {
        self.adapter.as_ref().map_or(&self.base, |(_, params)| params)
    }

    /// What is learned.
    pub fn learned_mut(&mut self) -> &mut Params<B> {
        self.adapter.as_mut().map_or(&mut self.base, |(_, params)| params)
    }

    fn shape(&self) -> Option<&Adapter> {
        self.adapter.as_ref().map(|(adapter, _)| adapter)
    }

    fn constants(&self) -> Pass<B> {
        Pass { base: self.base.constants(), adapter: self.adapter.as_ref().map(|(_, p)| p.constants()) }
    }

    fn tracked(&self) -> Pass<Autodiff<B>> {
        match &self.adapter {
            None => Pass { base: self.base.tracked(), adapter: None },
            Some((_, params)) => Pass { base: self.base.frozen(), adapter: Some(params.tracked()) },
        }
    }

    /// Minus the log-probability of each of the batch's targets, `[targets]`, without dropout.
    pub fn losses(&self, batch: &Batch) -> Vec<f32> {
        let pass = self.constants();
        let reads = pass.reads(self.shape(), (0.0, 0));
        let x = self.decoder.embed(&reads, &batch.ids);
        let x = self.decoder.layers_of(&reads, x, &self.decoder.packed(&batch.lengths));
        host(self.decoder.losses(&reads, x, &batch.positions, &batch.targets))
    }

    /// Logits of every position of one text, `[tokens * vocab]` row by row.
    pub fn logits(&self, ids: &[u32]) -> Vec<f32> {
        let pass = self.constants();
        let reads = pass.reads(self.shape(), (0.0, 0));
        let x = self.decoder.layers_of(&reads, self.decoder.embed(&reads, ids), &self.decoder.packed(&[ids.len()]));
        host(self.decoder.logits(&reads, x))
    }

    /// Adds the gradients of `share` times the sum of the batch's losses to `into`; gives that sum (without the share).
    /// `seed` chooses what dropout drops.
    pub fn gradients(&self, batch: &Batch, share: f64, seed: u64, into: &mut Gradients<B>) -> f64 {
        let packed = self.decoder.packed(&batch.lengths);
        match self.recompute {
            false => self.gradients_at_once(batch, &packed, (share, seed), into),
            true => self.gradients_by_layer(batch, &packed, (share, seed), into),
        }
    }

    fn gradients_at_once(
        &self,
        batch: &Batch,
        packed: &Packed,
        (share, seed): (f64, u64),
        into: &mut Gradients<B>,
    ) -> f64 {
        let pass = self.tracked();
        let reads = pass.reads(self.shape(), (self.dropout, seed));
        let x = self.decoder.layers_of(&reads, self.decoder.embed(&reads, &batch.ids), packed);
        let losses = self.decoder.losses(&reads, x, &batch.positions, &batch.targets);
        let sum = total(losses.clone().inner());
        into.add::<2>(losses.sum().mul_scalar(share as f32), pass.learned(), &[]);
        sum
    }

    fn gradients_by_layer(
        &self,
        batch: &Batch,
        packed: &Packed,
        (share, seed): (f64, u64),
        into: &mut Gradients<B>,
    ) -> f64 {
        let dropout = (self.dropout, seed);
        let mut inputs = Vec::with_capacity(self.decoder.layers());
        let last = {
            let pass = self.constants();
            let reads = pass.reads(self.shape(), dropout);
            let mut x = self.decoder.embed(&reads, &batch.ids);
            for layer in 0..self.decoder.layers() {
                inputs.push(x.clone());
                x = self.decoder.layer(&reads, layer, x, packed);
            }
            x
        };
        let leaf = |x: Tensor<B, 2>| Tensor::<Autodiff<B>, 2>::from_inner(x).require_grad();
        // The gradient at `x`, which `loss` reads, while those of the weights are added up.
        let mut back = |x: Tensor<Autodiff<B>, 2>, pass: &Pass<Autodiff<B>>, loss: Tensor<Autodiff<B>, 1>| {
            let gradient = into.add(loss, pass.learned(), std::slice::from_ref(&x)).remove(0);
            gradient.unwrap_or_else(|| x.inner().zeros_like())
        };
        let (x, pass) = (leaf(last), self.tracked());
        let reads = pass.reads(self.shape(), dropout);
        let losses = self.decoder.losses(&reads, x.clone(), &batch.positions, &batch.targets);
        let sum = total(losses.clone().inner());
        let mut upstream = back(x, &pass, losses.sum().mul_scalar(share as f32));
        // The product with its gradient stands for the loss: the same gradients flow back from it.
        for layer in (0..self.decoder.layers()).rev() {
            let x = leaf(inputs.pop().expect("an input per layer"));
            let y = self.decoder.layer(&reads, layer, x.clone(), packed);
            upstream = back(x, &pass, y.mul(Tensor::from_inner(upstream)).sum());
        }
        if self.adapter.is_none() {
            let x = self.decoder.embed(&reads, &batch.ids);
            into.add::<2>(x.mul(Tensor::from_inner(upstream)).sum(), pass.learned(), &[]);
        }
        sum
    }
}

/// The sum in double precision.
fn total<B: Backend>(values: Tensor<B, 1>) -> f64 {
    values.into_data().iter::<f32>().map(f64::from).sum()
}

fn host<B: Backend, const D: usize>(values: Tensor<B, D>) -> Vec<f32> {
    values.into_data().iter::<f32>().collect()
}
