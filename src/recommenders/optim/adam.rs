//! Adam as an operation of the back ends: one pass over the memory on the CPU, Burn's operations elsewhere.
//!
//! In: value, gradient and moments. Out: value and moments after a step. As in torch: betas .9 and .999, epsilon
//! added after the square root, both moments corrected by the number of steps.

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::{Autodiff, Flex};
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData, TensorPrimitive};
use burn_flex::FlexTensor;
use rayon::prelude::*;

/// Adam's settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam {
    /// Step size.
    pub rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay (AdamW): `value *= 1 - rate * decay` before the step; 0 = none.
    pub decay: f64,
    /// The gradient of all weights together is scaled down to this norm; `None` = as it is.
    pub clip_norm: Option<f64>,
}

impl Adam {
    /// Adam with torch's defaults.
    pub fn new(rate: f64) -> Self {
        Adam { rate, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, decay: 0.0, clip_norm: None }
    }

    /// The constants of step number `t` (1-based).
    pub fn step(&self, t: usize) -> Step {
        let t = i32::try_from(t).unwrap_or(i32::MAX);
        Step {
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            rest1: (1.0 - self.beta1) as f32,
            rest2: (1.0 - self.beta2) as f32,
            rate: (self.rate / (1.0 - self.beta1.powi(t))) as f32,
            scale: (1.0 / (1.0 - self.beta2.powi(t)).sqrt()) as f32,
            epsilon: self.epsilon as f32,
            keep: (1.0 - self.rate * self.decay) as f32,
        }
    }
}

/// `m = beta1 m + rest1 g; v = beta2 v + rest2 g g; value = keep value - rate m / (scale sqrt(v) + epsilon)`.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// 1 less `beta1`, rounded once: in f32, 1 - .999 is off by 5e-5.
    pub rest1: f32,
    /// 1 less `beta2`, rounded once.
    pub rest2: f32,
    /// Step size with the first moment's correction.
    pub rate: f32,
    /// The second moment's correction.
    pub scale: f32,
    /// Added to the root.
    pub epsilon: f32,
    /// 1 less the decoupled decay.
    pub keep: f32,
}

/// A weight with its moments; all three have the same shape.
pub type State<B> = (Tensor<B, 1>, Tensor<B, 1>, Tensor<B, 1>);

/// A back end that can take Adam's step.
pub trait AdamBackend: Backend {
    /// Step over a whole weight, `grad` of its length.
    fn adam(state: State<Self>, grad: Tensor<Self, 1>, step: Step) -> State<Self> {
        adam_generic(state, grad, step)
    }

    /// The distinct rows, ascending, and their summed gradients `[rows * dim]`; gradients of a row are added in the
    /// order of `reads`, of which there is at least one.
    fn sum_rows(reads: Reads<Self>) -> (Vec<u32>, Tensor<Self, 1>) {
        sum_rows_generic(reads)
    }

    /// Step over rows `rows` (distinct) of a table of `dim` columns, `grad [rows.len() * dim]`.
    fn adam_rows(state: State<Self>, dim: usize, rows: &[u32], grad: Tensor<Self, 1>, step: Step) -> State<Self> {
        let device = grad.device();
        let n = rows.len();
        let index: Vec<i32> = rows.iter().map(|&r| r as i32).collect();
        let index = Tensor::<Self, 1, Int>::from_data(TensorData::new(index, [n]), &device);
        let table = |t: Tensor<Self, 1>| {
            let rows = t.dims()[0] / dim;
            t.reshape([rows, dim])
        };
        let all = [state.0, state.1, state.2].map(table);
        let [value, m, v] = all.clone().map(|t| t.select(0, index.clone()).reshape([n * dim]));
        let new = adam_generic((value.clone(), m.clone(), v.clone()), grad, step);
        let [a, b, c] = all;
        let put = |table: Tensor<Self, 2>, old: Tensor<Self, 1>, new: Tensor<Self, 1>| {
            let len = table.dims()[0] * dim;
            let change = (new - old).reshape([n, dim]);
            table.select_assign(0, index.clone(), change, burn::tensor::IndexingUpdateOp::Add).reshape([len])
        };
        (put(a, value, new.0), put(b, m, new.1), put(c, v, new.2))
    }
}

/// Rows of a table that were read, repeats allowed, and the gradient `[rows, dim]` of what was read.
pub type Reads<B> = Vec<(Vec<u32>, Tensor<B, 2>)>;

/// As [`AdamBackend::sum_rows`], in Burn's operations.
fn sum_rows_generic<B: Backend>(reads: Reads<B>) -> (Vec<u32>, Tensor<B, 1>) {
    let all: Vec<u32> = reads.iter().flat_map(|r| r.0.iter().copied()).collect();
    let grads = Tensor::cat(reads.into_iter().map(|r| r.1).collect(), 0);
    let mut distinct = all.clone();
    distinct.sort_unstable();
    distinct.dedup();
    let [n, dim] = grads.dims();
    let (rows, device) = (distinct.len(), grads.device());
    let place = |row: &u32| distinct.binary_search(row).expect("`distinct` holds every row") as i32;
    let index: Vec<i32> = all.iter().map(place).collect();
    let index = Tensor::<B, 1, Int>::from_data(TensorData::new(index, [n]), &device);
    let sums = Tensor::<B, 2>::zeros([rows, dim], &device);
    let sums = sums.select_assign(0, index, grads, burn::tensor::IndexingUpdateOp::Add);
    (distinct, sums.reshape([rows * dim]))
}

fn adam_generic<B: Backend>((value, m, v): State<B>, grad: Tensor<B, 1>, s: Step) -> State<B> {
    let m = m * s.beta1 + grad.clone() * s.rest1;
    let v = v * s.beta2 + grad.clone() * grad * s.rest2;
    let value = value * s.keep - m.clone() * s.rate / (v.clone().sqrt() * s.scale + s.epsilon);
    (value, m, v)
}

/// Models are generic over both; steps are taken on the inner back end only.
impl<B: AdamBackend, C: CheckpointStrategy> AdamBackend for Autodiff<B, C> {}

/// Elements below which a second thread costs more than it saves.
const SEQUENTIAL: usize = 1 << 15;

impl AdamBackend for Flex {
    fn adam(state: State<Self>, grad: Tensor<Self, 1>, step: Step) -> State<Self> {
        let [mut value, mut m, mut v] = flex(state);
        let grad = grad.into_primitive().tensor().to_contiguous();
        {
            let n = grad.storage::<f32>().len();
            let chunk = n.div_ceil(rayon::current_num_threads()).max(SEQUENTIAL);
            let parts = value.storage_mut::<f32>().par_chunks_mut(chunk);
            let parts = parts.zip(m.storage_mut::<f32>().par_chunks_mut(chunk));
            let parts = parts.zip(v.storage_mut::<f32>().par_chunks_mut(chunk));
            parts.zip(grad.storage::<f32>().par_chunks(chunk)).for_each(|(((x, m), v), g)| update(x, m, v, g, step));
        }
        tensors([value, m, v])
    }

    fn sum_rows(reads: Reads<Self>) -> (Vec<u32>, Tensor<Self, 1>) {
        let dim = reads[0].1.dims()[1];
        let (rows, grads): (Vec<_>, Vec<_>) = reads.into_iter().unzip();
        let grads: Vec<FlexTensor> = grads.into_iter().map(|g| g.into_primitive().tensor().to_contiguous()).collect();
        let slices: Vec<&[f32]> = grads.iter().map(|g| g.storage::<f32>()).collect();
        let (distinct, sums) = sum_slices(&rows, &slices, dim);
        let n = sums.len();
        (distinct, Tensor::from_data(TensorData::new(sums, [n]), &Default::default()))
    }

    fn adam_rows(state: State<Self>, dim: usize, rows: &[u32], grad: Tensor<Self, 1>, step: Step) -> State<Self> {
        let [mut value, mut m, mut v] = flex(state);
        let grad = grad.into_primitive().tensor().to_contiguous();
        {
            let (x, m, v) = (value.storage_mut::<f32>(), m.storage_mut::<f32>(), v.storage_mut::<f32>());
            for (&row, g) in rows.iter().zip(grad.storage::<f32>().chunks_exact(dim)) {
                let at = row as usize * dim..(row as usize + 1) * dim;
                update(&mut x[at.clone()], &mut m[at.clone()], &mut v[at], g, step);
            }
        }
        tensors([value, m, v])
    }
}

/// [`AdamBackend::sum_rows`] of slices. Every sum is taken by one thread in a fixed order.
fn sum_slices(rows: &[Vec<u32>], grads: &[&[f32]], dim: usize) -> (Vec<u32>, Vec<f32>) {
    // Row, read and place in the read of every gradient, sorted: in one number, since that sorts fastest.
    let bits = |n: usize| usize::BITS - n.leading_zeros();
    let (of_read, of_place) = (bits(rows.len()), bits(rows.iter().map(Vec::len).max().unwrap_or(0)));
    assert!(of_read + of_place <= 32, "a batch reads too many rows of one table");
    let keys = rows.iter().enumerate().flat_map(|(read, rows)| {
        rows.iter()
            .enumerate()
            .map(move |(place, &row)| u64::from(row) << 32 | (read as u64) << of_place | place as u64)
    });
    let mut keys: Vec<u64> = keys.collect();
    if !keys.is_sorted() {
        keys.par_sort_unstable();
    }
    let mut starts: Vec<usize> = (0..keys.len()).filter(|&n| n == 0 || keys[n] >> 32 != keys[n - 1] >> 32).collect();
    let distinct: Vec<u32> = starts.iter().map(|&n| (keys[n] >> 32) as u32).collect();
    starts.push(keys.len());
    let gradient = |key: u64| {
        let place = (key & ((1 << of_place) - 1)) as usize;
        &grads[(key as u32 >> of_place) as usize][place * dim..][..dim]
    };
    let mut sums = vec![0f32; distinct.len() * dim];
    let block = SEQUENTIAL.div_ceil(dim.max(1));
    sums.par_chunks_mut((block * dim).max(1)).zip(starts[..distinct.len()].par_chunks(block)).enumerate().for_each(
        |(n, (sums, _))| {
            let starts = &starts[n * block..];
            for (sum, range) in sums.chunks_exact_mut(dim).zip(starts.windows(2)) {
                let keys = &keys[range[0]..range[1]];
                sum.copy_from_slice(gradient(keys[0]));
                for &key in &keys[1..] {
                    sum.iter_mut().zip(gradient(key)).for_each(|(s, g)| *s += g);
                }
            }
        },
    );
    (distinct, sums)
}

fn flex((value, m, v): State<Flex>) -> [FlexTensor; 3] {
    [value, m, v].map(|t| match t.into_primitive().tensor() {
        t if t.is_contiguous() => t,
        t => t.to_contiguous(),
    })
}

fn tensors(all: [FlexTensor; 3]) -> State<Flex> {
    let [value, m, v] = all.map(|t| Tensor::from_primitive(TensorPrimitive::Float(t)));
    (value, m, v)
}

/// One step over slices of equal length.
fn update(x: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], s: Step) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: just checked.
        return unsafe { update_avx2(x, m, v, g, s) };
    }
    update_body(x, m, v, g, s);
}

/// The same loop, which the compiler may turn into AVX2 code.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn update_avx2(x: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], s: Step) {
    update_body(x, m, v, g, s);
}

#[inline(always)]
fn update_body(x: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], s: Step) {
    for (((x, m), v), &g) in x.iter_mut().zip(m.iter_mut()).zip(v.iter_mut()).zip(g) {
        *m = s.beta1 * *m + s.rest1 * g;
        *v = s.beta2 * *v + s.rest2 * (g * g);
        *x = s.keep * *x - s.rate * *m / (v.sqrt() * s.scale + s.epsilon);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(values: &[f64]) -> Tensor<Flex, 1> {
        Tensor::from_data(
            TensorData::new(values.iter().map(|&x| x as f32).collect::<Vec<f32>>(), [values.len()]),
            &Default::default(),
        )
    }

    fn values(t: &Tensor<Flex, 1>) -> Vec<f32> {
        t.to_data().to_vec().unwrap()
    }

    /// Kingma and Ba's algorithm 1 in double precision.
    fn reference(x: &mut [f64], m: &mut [f64], v: &mut [f64], g: &[f64], rate: f64, t: i32) {
        for n in 0..x.len() {
            m[n] = 0.9 * m[n] + 0.1 * g[n];
            v[n] = 0.999 * v[n] + 0.001 * g[n] * g[n];
            let (mh, vh) = (m[n] / (1.0 - 0.9f64.powi(t)), v[n] / (1.0 - 0.999f64.powi(t)));
            x[n] -= rate * mh / (vh.sqrt() + 1e-8);
        }
    }

    #[test]
    fn three_steps_equal_the_algorithm_in_double_precision() {
        let mut x: Vec<f64> = (0..13).map(|n| f64::from(n) * 0.3 - 1.0).collect();
        let (mut m, mut v) = (vec![0.0; 13], vec![0.0; 13]);
        let mut flex = (tensor(&x), tensor(&m), tensor(&v));
        let mut generic = flex.clone();
        for t in 1..=3 {
            let g: Vec<f64> = (0..13).map(|n| f64::from(n * t).sin()).collect();
            reference(&mut x, &mut m, &mut v, &g, 0.01, t);
            let step = Adam::new(0.01).step(t as usize);
            flex = Flex::adam(flex, tensor(&g), step);
            generic = adam_generic(generic, tensor(&g), step);
        }
        for (got, want) in values(&flex.0).iter().chain(&values(&generic.0)).zip(x.iter().chain(&x)) {
            assert!((f64::from(*got) - want).abs() < 1e-5, "{got} is not {want}");
        }
    }

    #[test]
    fn rows_read_several_times_are_summed_in_the_order_of_the_reads() {
        let table = |n: usize, dim: usize, k: f32| {
            let values: Vec<f32> = (0..n * dim).map(|x| (x as f32 * k).sin()).collect();
            Tensor::<Flex, 2>::from_data(TensorData::new(values, [n, dim]), &Default::default())
        };
        let many: Vec<u32> = (0..50_000u32).map(|n| (n * 7919) % 3000).collect();
        let cases = [
            vec![(vec![3u32, 1, 3], table(3, 4, 0.7))],
            vec![(vec![0, 2, 5], table(3, 2, 0.7)), (vec![2, 2], table(2, 2, 0.3))],
            vec![(many.clone(), table(50_000, 3, 0.7)), (vec![9], table(1, 3, 0.1)), (many, table(50_000, 3, 0.2))],
            vec![(Vec::new(), table(0, 3, 1.0))],
        ];
        for reads in cases {
            let (rows, sums) = Flex::sum_rows(reads.clone());
            let (want_rows, want) = sum_rows_generic(reads.clone());
            assert_eq!(rows, want_rows);
            assert_eq!(values(&sums), values(&want));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(5).build().unwrap();
            assert_eq!(values(&pool.install(|| Flex::sum_rows(reads)).1), values(&sums));
        }
    }

    #[test]
    fn a_step_over_rows_changes_those_rows_only_and_as_a_whole_step_would() {
        let x: Vec<f64> = (0..12).map(f64::from).collect();
        let g: Vec<f64> = (0..12).map(|n| f64::from(n).cos()).collect();
        let start = || (tensor(&x), tensor(&[0.5; 12]), tensor(&[0.25; 12]));
        let step = Adam { decay: 0.1, ..Adam::new(0.1) }.step(1);
        let whole = values(&Flex::adam(start(), tensor(&g), step).0);
        // Rows 3 and 1 of [4, 3].
        let rows = [3u32, 1];
        let grad: Vec<f64> = rows.iter().flat_map(|&r| g[r as usize * 3..][..3].to_vec()).collect();
        let some = values(&Flex::adam_rows(start(), 3, &rows, tensor(&grad), step).0);
        for n in 0..12 {
            let want = if [1, 3].contains(&(n / 3)) { whole[n] } else { x[n] as f32 };
            assert_eq!(some[n], want, "element {n}");
        }
    }
}
