//! Weights by name with their moments.

use std::cell::RefCell;
use std::collections::BTreeMap;

use burn::backend::Autodiff;
use burn::tensor::backend::Backend;
use burn::tensor::{ElementConversion, Int, Tensor, TensorData};

use super::adam::{Adam, AdamBackend, Reads};
use crate::error::Result;
use crate::recommenders::saved::{NamedTensor, Tensors};

/// A weight of some [`Params`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamId(usize);

/// All weights of a model.
pub struct Params<B: Backend> {
    pub(super) device: B::Device,
    pub(super) list: Vec<Param<B>>,
    pub(super) steps: usize,
}

/// Values and moments are flat; `shape` is how the model sees them.
pub(super) struct Param<B: Backend> {
    pub(super) name: String,
    shape: Vec<usize>,
    value: Tensor<B, 1>,
    moments: Option<(Tensor<B, 1>, Tensor<B, 1>)>,
    /// Factor of the step size.
    pub(super) rate: f64,
}

/// The weights as a model reads them, with or without gradients.
pub struct Vars<B: Backend> {
    pub(super) list: Vec<(Vec<usize>, Tensor<B, 1>)>,
    tracked: bool,
    rows: RefCell<Vec<RowLeaf<B>>>,
}

/// Rows of a table that a model has read.
struct RowLeaf<B: Backend> {
    param: usize,
    rows: Vec<u32>,
    leaf: Tensor<B, 2>,
}

impl<B: Backend> Params<B> {
    /// No weights yet.
    pub fn new(device: &B::Device) -> Self {
        Params { device: device.clone(), list: Vec::new(), steps: 0 }
    }

    /// Where they live.
    pub fn device(&self) -> &B::Device {
        &self.device
    }

    /// Adds a weight.
    ///
    /// # Panics
    /// When `values` are not as many as `shape` says (our bug).
    pub fn add(&mut self, name: &str, shape: &[usize], values: Vec<f32>) -> ParamId {
        let n: usize = shape.iter().product();
        assert_eq!(values.len(), n, "weight `{name}` does not have its shape {shape:?}");
        let value = Tensor::from_data(TensorData::new(values, [n]), &self.device);
        self.list.push(Param { name: name.to_owned(), shape: shape.to_vec(), value, moments: None, rate: 1.0 });
        ParamId(self.list.len() - 1)
    }

    /// Multiplies the step size of one weight; 1 at first.
    pub fn set_rate(&mut self, id: ParamId, factor: f64) {
        self.list[id.0].rate = factor;
    }

    /// The weights without gradients.
    pub fn constants(&self) -> Vars<B> {
        let list = self.list.iter().map(|p| (p.shape.clone(), p.value.clone())).collect();
        Vars { list, tracked: false, rows: RefCell::default() }
    }

    /// The weights with gradients.
    pub fn tracked(&self) -> Vars<Autodiff<B>> {
        let leaf = |p: &Param<B>| Tensor::<Autodiff<B>, 1>::from_inner(p.value.clone()).require_grad();
        let list = self.list.iter().map(|p| (p.shape.clone(), leaf(p))).collect();
        Vars { list, tracked: true, rows: RefCell::default() }
    }

    /// The weights as constants of a computation that has gradients elsewhere.
    pub fn frozen(&self) -> Vars<Autodiff<B>> {
        let constant = |p: &Param<B>| Tensor::<Autodiff<B>, 1>::from_inner(p.value.clone());
        let list = self.list.iter().map(|p| (p.shape.clone(), constant(p))).collect();
        Vars { list, tracked: false, rows: RefCell::default() }
    }

    /// How many weights there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// How many numbers all weights have together.
    pub fn numbers(&self) -> usize {
        self.list.iter().map(|p| p.shape.iter().product::<usize>()).sum()
    }

    /// The weights' values on the host.
    pub fn tensors(&self) -> Vec<NamedTensor> {
        self.list.iter().map(|p| NamedTensor::new(&p.name, p.shape.clone(), host(&p.value))).collect()
    }

    /// Replaces the values by those of the same names.
    ///
    /// # Errors
    /// One is missing or has another shape (exit 65).
    pub fn set(&mut self, tensors: &Tensors) -> Result<()> {
        for p in &mut self.list {
            let values = tensors.shaped(&p.name, &p.shape)?;
            p.value = Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), &self.device);
        }
        Ok(())
    }

    /// Replaces the value of a weight that is not learned by gradients, such as a running mean.
    ///
    /// # Panics
    /// When `value` is not of the weight's size (our bug).
    pub fn assign(&mut self, id: ParamId, value: Tensor<B, 1>) {
        let param = &mut self.list[id.0];
        assert_eq!(param.value.dims(), value.dims(), "weight `{}` keeps its size", param.name);
        param.value = value;
    }

    /// Moves the weights of `average`, which has the same ones, towards these: `keep * average + (1 - keep) * value`.
    ///
    /// # Panics
    /// When it has others (our bug).
    pub fn average_into(&self, average: &mut Params<B>, keep: f64) {
        assert_eq!(self.list.len(), average.list.len(), "an average of other weights");
        for (from, to) in self.list.iter().zip(&mut average.list) {
            assert_eq!(from.name, to.name, "an average of other weights");
            let old = std::mem::replace(&mut to.value, Tensor::zeros([0], &self.device));
            to.value = old * keep as f32 + from.value.clone() * (1.0 - keep) as f32;
        }
    }

    /// Values, moments and the number of steps, for a checkpoint.
    pub fn state(&self) -> Vec<NamedTensor> {
        let mut all = self.tensors();
        for p in &self.list {
            if let Some((m, v)) = &p.moments {
                all.push(NamedTensor::new(&format!("{}.m", p.name), p.shape.clone(), host(m)));
                all.push(NamedTensor::new(&format!("{}.v", p.name), p.shape.clone(), host(v)));
            }
        }
        // Exact below 2^24 in each half.
        let steps = vec![(self.steps >> 20) as f32, (self.steps & 0xF_FFFF) as f32];
        all.push(NamedTensor::new("adam.steps", vec![2], steps));
        all
    }

    /// Takes back what [`Params::state`] gave.
    ///
    /// # Errors
    /// A tensor is missing or has another shape (exit 65).
    pub fn restore(&mut self, state: &Tensors) -> Result<()> {
        self.set(state)?;
        let steps = state.shaped("adam.steps", &[2])?;
        self.steps = ((steps[0] as usize) << 20) + steps[1] as usize;
        for p in &mut self.list {
            let device = &self.device;
            let tensor = |values: &[f32]| Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), device);
            let (m, v) = (format!("{}.m", p.name), format!("{}.v", p.name));
            p.moments = match state.has(&m) {
                true => Some((tensor(state.shaped(&m, &p.shape)?), tensor(state.shaped(&v, &p.shape)?))),
                false => None,
            };
        }
        Ok(())
    }
}

impl<B: AdamBackend> Params<B> {
    /// One step of Adam down the gradient of `loss`, and the value of `loss` (still on the device).
    ///
    /// # Panics
    /// When a table was read both whole and by rows (our bug).
    pub fn step(&mut self, loss: Tensor<Autodiff<B>, 1>, vars: Vars<Autodiff<B>>, adam: &Adam) -> Tensor<B, 1> {
        self.steps += 1;
        let mut grads = loss.backward();
        let mut whole: Vec<Option<Tensor<B, 1>>> =
            vars.list.iter().map(|(_, leaf)| leaf.grad_remove(&mut grads)).collect();
        let mut by_rows: Vec<(usize, Vec<u32>, Tensor<B, 2>)> = Vec::new();
        // Whole tables must have one owner when their step is taken, or it copies them.
        let Vars { list, rows, .. } = vars;
        drop(list);
        for read in rows.into_inner() {
            assert!(whole[read.param].is_none(), "`{}` was read whole and by rows", self.list[read.param].name);
            if let Some(grad) = read.leaf.grad_remove(&mut grads) {
                by_rows.push((read.param, read.rows, grad));
            }
        }
        let mut by_rows = merged::<B>(by_rows);
        let scale = adam.clip_norm.map(|limit| {
            let squares = |g: Tensor<B, 1>| g.powi_scalar(2).sum();
            let mut sum = Tensor::<B, 1>::zeros([1], &self.device);
            for g in whole.iter().flatten() {
                sum = sum + squares(g.clone());
            }
            for (_, _, g) in &by_rows {
                sum = sum + squares(g.clone());
            }
            ((sum.sqrt() + 1e-6).recip() * limit as f32).clamp_max(1.0)
        });
        if let Some(scale) = scale {
            for g in whole.iter_mut().flatten().chain(by_rows.iter_mut().map(|(_, _, g)| g)) {
                *g = g.clone() * scale.clone();
            }
        }
        let steps = self.steps;
        let step_of = |rate: f64| Adam { rate: adam.rate * rate, ..*adam }.step(steps);
        for (param, grad) in self.list.iter_mut().zip(whole) {
            if let Some(grad) = grad {
                let step = step_of(param.rate);
                param.update(|state| B::adam(state, grad, step));
            }
        }
        for (n, rows, grad) in by_rows {
            let dim = self.list[n].shape[1];
            let step = step_of(self.list[n].rate);
            self.list[n].update(|state| B::adam_rows(state, dim, &rows, grad, step));
        }
        loss.inner()
    }
}

#[cfg(test)]
impl<B: AdamBackend> Params<B> {
    /// The gradient of `loss` at each weight, whole tables, for tests against golden values.
    pub fn gradients(&self, loss: Tensor<Autodiff<B>, 1>, vars: Vars<Autodiff<B>>) -> Vec<NamedTensor> {
        let mut grads = loss.backward();
        let mut all: Vec<NamedTensor> = self.tensors();
        for (tensor, (_, leaf)) in all.iter_mut().zip(&vars.list) {
            match leaf.grad_remove(&mut grads) {
                Some(grad) => tensor.values = host(&grad),
                None => tensor.values.fill(0.0),
            }
        }
        for read in vars.rows.into_inner() {
            let grad = read.leaf.grad_remove(&mut grads).map(|g| host(&g.flatten::<1>(0, 1))).unwrap_or_default();
            let dim = self.list[read.param].shape[1];
            for (&row, from) in read.rows.iter().zip(grad.chunks_exact(dim)) {
                let to = &mut all[read.param].values[row as usize * dim..][..dim];
                to.iter_mut().zip(from).for_each(|(a, b)| *a += b);
            }
        }
        all
    }
}

impl<B: Backend> Param<B> {
    pub(super) fn update(&mut self, step: impl FnOnce(super::adam::State<B>) -> super::adam::State<B>) {
        let device = self.value.device();
        let empty = || Tensor::zeros([0], &device);
        // The value is moved out, so that the step may write into its memory.
        let value = std::mem::replace(&mut self.value, empty());
        let n = value.dims()[0];
        let (m, v) = self.moments.take().unwrap_or_else(|| (Tensor::zeros([n], &device), Tensor::zeros([n], &device)));
        let (value, m, v) = step((value, m, v));
        self.value = value;
        self.moments = Some((m, v));
    }
}

/// Gradients of rows by table, with one row each: those that were read several times are summed in a fixed order.
fn merged<B: AdamBackend>(reads: Vec<(usize, Vec<u32>, Tensor<B, 2>)>) -> Vec<(usize, Vec<u32>, Tensor<B, 1>)> {
    let mut tables = BTreeMap::<usize, Reads<B>>::new();
    for (table, rows, grad) in reads {
        tables.entry(table).or_default().push((rows, grad));
    }
    let merge = |(table, reads)| {
        let (rows, sums) = B::sum_rows(reads);
        (table, rows, sums)
    };
    tables.into_iter().map(merge).collect()
}

impl<B: Backend> Vars<B> {
    /// A weight whole.
    ///
    /// # Panics
    /// When it does not have `D` dimensions (our bug).
    pub fn get<const D: usize>(&self, id: ParamId) -> Tensor<B, D> {
        let (shape, value) = &self.list[id.0];
        let shape: [usize; D] =
            shape.as_slice().try_into().expect("a weight is read with its own number of dimensions");
        value.clone().reshape(shape)
    }

    /// Rows of a table `[n, dim]`: `[rows.len(), dim]`, repeats allowed. In a step only these rows are updated.
    ///
    /// # Panics
    /// When it is no table (our bug).
    pub fn rows(&self, id: ParamId, rows: &[u32]) -> Tensor<B, 2> {
        let (shape, value) = &self.list[id.0];
        let &[n, dim] = shape.as_slice() else { panic!("rows of a weight of shape {shape:?}") };
        let index: Vec<i32> = rows.iter().map(|&r| r as i32).collect();
        let index = Tensor::<B, 1, Int>::from_data(TensorData::new(index, [rows.len()]), &value.device());
        let table = value.clone().detach().reshape([n, dim]);
        let read = table.select(0, index);
        if !self.tracked {
            return read;
        }
        let leaf = read.detach().require_grad();
        self.rows.borrow_mut().push(RowLeaf { param: id.0, rows: rows.to_vec(), leaf: leaf.clone() });
        leaf
    }
}

fn host<B: Backend>(values: &Tensor<B, 1>) -> Vec<f32> {
    values.to_data().iter::<f32>().map(|x| x.elem()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;

    type A = Autodiff<Flex>;

    fn table() -> Vec<f32> {
        (0..12).map(|n| (n as f32 * 0.7).sin()).collect()
    }

    /// Loss: sum over reads of (row . weights)^2.
    fn loss(rows: Tensor<A, 2>, vars: &Vars<A>, w: ParamId) -> Tensor<A, 1> {
        (rows * vars.get::<1>(w).reshape([1, 3])).sum_dim(1).powi_scalar(2).sum()
    }

    #[test]
    fn rows_learn_as_the_whole_table_does() {
        let run = |by_rows: bool, clip: Option<f64>| {
            let mut params = Params::<Flex>::new(&Default::default());
            let t = params.add("t", &[4, 3], table());
            let w = params.add("w", &[3], vec![0.5, -1.0, 2.0]);
            let adam = Adam { clip_norm: clip, ..Adam::new(0.1) };
            // Row 2 twice; every row at each step, since rows that are not read differ by design.
            let index = [2u32, 0, 2, 1, 3];
            for _ in 0..3 {
                let vars = params.tracked();
                let rows = match by_rows {
                    true => vars.rows(t, &index),
                    false => {
                        let index = Tensor::<A, 1, Int>::from_data([2, 0, 2, 1, 3], &Default::default());
                        vars.get::<2>(t).select(0, index)
                    }
                };
                let loss = loss(rows, &vars, w);
                params.step(loss, vars, &adam);
            }
            params.tensors()
        };
        for clip in [None, Some(0.5)] {
            for (a, b) in run(true, clip).iter().zip(&run(false, clip)) {
                for (x, y) in a.values.iter().zip(&b.values) {
                    assert!((x - y).abs() < 1e-5, "{}: {x} is not {y}", a.name);
                }
            }
        }
        assert_ne!(run(true, None)[0].values, run(true, Some(0.5))[0].values);
    }

    #[test]
    fn a_restored_state_goes_on_to_the_same_bits() {
        let make = || {
            let mut params = Params::<Flex>::new(&Default::default());
            let t = params.add("t", &[4, 3], table());
            let w = params.add("w", &[3], vec![0.5, -1.0, 2.0]);
            (params, t, w)
        };
        let step = |params: &mut Params<Flex>, t, w, row: u32| {
            let vars = params.tracked();
            let loss = loss(vars.rows(t, &[row]), &vars, w);
            params.step(loss, vars, &Adam::new(0.1));
        };
        let (mut straight, t, w) = make();
        step(&mut straight, t, w, 1);
        let state = straight.state();
        step(&mut straight, t, w, 2);
        let (mut resumed, t, w) = make();
        resumed.restore(&Tensors::new(state)).unwrap();
        step(&mut resumed, t, w, 2);
        assert_eq!(resumed.state(), straight.state());
        assert!(resumed.restore(&Tensors::new(Vec::new())).is_err());
    }

    #[test]
    fn a_weight_can_have_a_step_size_of_its_own() {
        // Adam's first step is the step size, whatever the gradient.
        let mut params = Params::<Flex>::new(&Default::default());
        let t = params.add("t", &[2, 1], vec![1.0, 1.0]);
        let w = params.add("w", &[1], vec![1.0]);
        let v = params.add("v", &[1], vec![1.0]);
        params.set_rate(t, 3.0);
        params.set_rate(v, 0.0);
        let vars = params.tracked();
        let rows = vars.rows(t, &[0]).reshape([1]);
        params.step(rows + vars.get::<1>(w) + vars.get::<1>(v), vars, &Adam::new(0.1));
        let values: Vec<f32> = params.tensors().into_iter().flat_map(|t| t.values).collect();
        for (got, want) in values.iter().zip([0.7, 1.0, 0.9, 1.0]) {
            assert!((got - want).abs() < 1e-5, "{values:?}");
        }
    }

    #[test]
    fn an_average_moves_towards_the_weights() {
        let make = |value: f32| {
            let mut params = Params::<Flex>::new(&Default::default());
            params.add("w", &[2], vec![value, 1.0]);
            params
        };
        let mut average = make(3.0);
        make(5.0).average_into(&mut average, 0.75);
        assert_eq!(average.tensors()[0].values, [3.5, 1.0]);
    }

    #[test]
    fn the_number_of_steps_survives_beyond_what_f32_counts() {
        let mut params = Params::<Flex>::new(&Default::default());
        params.steps = (1 << 30) + 12_345;
        let state = params.state();
        params.steps = 0;
        params.restore(&Tensors::new(state)).unwrap();
        assert_eq!(params.steps, (1 << 30) + 12_345);
    }
}
