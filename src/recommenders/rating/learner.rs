//! Rating models in training.
//!
//! In: a [`RatingModel`] (what is added to the linear terms), [`Ratings`]. Out: a [`RatingFit`] by the shared
//! [`trainer`].
//!
//! * Prediction: `bias + sum of the linear weights of the row's values + dense . weights + model`, clipped to the range
//!   of the train ratings (when used, not in the loss). The bias starts at the mean of the train ratings.
//! * Loss: mean squared error over the batch, plus L2: `l2_reg_embedding` and `l2_reg_linear` times the squares of the
//!   weights that the batch reads, once for each time they are read, as a mean over the batch. DeepCTR-Torch takes the
//!   whole tables at each step; here a step costs what its batch costs.
//! * Embeddings start normal with deviation `init_std`, linear weights at 0. Values without a train row have zeros
//!   throughout, so that they contribute nothing.

use burn::backend::Autodiff;
use burn::tensor::backend::Backend;
use burn::tensor::{ElementConversion, Tensor, TensorData};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::layers::Pass;
use super::layout::{Batch, Layout, RecentOf, Scratch, Source};
use super::predictor::Fitted;
use super::recent::Recent;
use super::{Predictor, RatingFit, Ratings, rmse};
use crate::device::{ModelBackend, OnBackend};
use crate::error::Result;
use crate::recommenders::optim::{Adam, ParamId, Params, Vars, normal};
use crate::recommenders::saved::{NamedTensor, Tensors};
use crate::recommenders::sparse::{Csr, SparseMatrix};
use crate::recommenders::trainer::{self, Learner, Schedule, epoch_rng};
use crate::recommenders::{FitContext, Watch};

/// The hyper-parameters that every rating model has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Common {
    /// Length of the embedding of a categorical value. Default 16 (DeepCTR-Torch: 4).
    #[schemars(range(min = 1, max = 4096))]
    pub embedding_dim: u32,
    /// Weight of the L2 term on the linear weights of a batch. Default 0.001, `deepfm` 0.03 (DeepCTR-Torch: 0.00001 on
    /// the whole table).
    #[schemars(range(min = 0.0, max = 10.0))]
    pub l2_reg_linear: f64,
    /// Weight of the L2 term on the embeddings of a batch. Default 0.03, `deepfm` 0.01, `afm` 0.00001 (DeepCTR-Torch:
    /// 0.00001 on the whole table).
    #[schemars(range(min = 0.0, max = 10.0))]
    pub l2_reg_embedding: f64,
    /// Standard deviation of the initial embeddings. Default 0.01, `afm` 0.1 (DeepCTR-Torch: 0.0001).
    #[schemars(range(min = 0.0, max = 10.0))]
    pub init_std: f64,
    /// Decay of one more dense field, which is OURS and in none of the papers: how the user has rated of late, 0 to
    /// below 1. It is the mean deviation of the user's earlier train ratings from their items' means, each older one
    /// counting `recent_decay` times as much; a train row sees earlier rows only, a prediction all train rows. It needs
    /// train rows in time order. 0 = no such field: the paper's model. Default 0.75.
    #[schemars(range(min = 0.0, max = 0.999))]
    pub recent_decay: f64,
    /// Steps and epochs.
    #[serde(flatten)]
    pub schedule: Schedule,
}

/// Sizes that a model's weights depend on.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Categorical fields, the two ids included.
    pub fields: usize,
    /// Length of an embedding.
    pub dim: usize,
    /// Dense fields.
    pub dense: usize,
}

impl Sizes {
    /// Width of [`Inputs::flat`].
    pub fn flat(&self) -> usize {
        self.fields * self.dim + self.dense
    }
}

/// What a model sees of a batch.
pub struct Inputs<B: Backend> {
    /// `[batch, fields, dim]`; lists are pooled by their mean.
    pub embeddings: Tensor<B, 3>,
    /// `[batch, dense]`, standardised.
    pub dense: Option<Tensor<B, 2>>,
}

impl<B: Backend> Inputs<B> {
    /// Embeddings one after another, then dense values: `[batch, fields * dim + dense]`.
    pub fn flat(&self) -> Tensor<B, 2> {
        let [batch, fields, dim] = self.embeddings.dims();
        self.beside(self.embeddings.clone().reshape([batch, fields * dim]))
    }

    /// `x [batch, n]` and the dense values beside it.
    pub fn beside(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match &self.dense {
            Some(dense) => Tensor::cat(vec![x, dense.clone()], 1),
            None => x,
        }
    }
}

/// What a backbone adds to the linear terms.
pub trait RatingModel: Clone + Send + Sync + 'static {
    /// Which weights are the model's own.
    type Weights: Send + Sync;

    /// The shared hyper-parameters.
    fn common(&self) -> &Common;

    /// Adds its weights; the start depends on `rng` alone.
    fn weights<B: ModelBackend>(&self, sizes: Sizes, params: &mut Params<B>, rng: &mut ChaCha8Rng) -> Self::Weights;

    /// Its part of the prediction, `[batch]`.
    fn forward<B: ModelBackend>(
        &self,
        weights: &Self::Weights,
        vars: &Vars<B>,
        inputs: &Inputs<B>,
        pass: &mut Pass<B>,
    ) -> Tensor<B, 1>;

    /// L2 terms of its own weights.
    fn penalty<B: ModelBackend>(&self, _weights: &Self::Weights, _vars: &Vars<B>) -> Option<Tensor<B, 1>> {
        None
    }
}

/// The weights of a model on a device.
pub struct Network<M: RatingModel, B: Backend> {
    /// All weights.
    pub params: Params<B>,
    model: M,
    own: M::Weights,
    bias: ParamId,
    linear: ParamId,
    embeddings: ParamId,
    dense: Option<ParamId>,
    fields: usize,
    denses: usize,
}

/// The rows of the two tables that a batch reads: `[rows, 1]` and `[rows, dim]`.
type Read<B> = (Tensor<B, 2>, Tensor<B, 2>);

impl<M: RatingModel, B: ModelBackend> Network<M, B> {
    /// Initial weights; `bias` is the mean rating.
    pub fn new(model: &M, layout: &Layout, bias: f32, rng: &mut ChaCha8Rng, device: &B::Device) -> Self {
        let common = model.common();
        let table = normal(layout.rows() * common.embedding_dim as usize, common.init_std as f32, rng);
        Self::with(model, layout, (bias, table), rng, device)
    }

    /// A network whose weights are to be replaced.
    pub fn blank(model: &M, layout: &Layout, device: &B::Device) -> Self {
        let table = vec![0.0; layout.rows() * model.common().embedding_dim as usize];
        Self::with(model, layout, (0.0, table), &mut ChaCha8Rng::seed_from_u64(0), device)
    }

    fn with(
        model: &M,
        layout: &Layout,
        (bias, table): (f32, Vec<f32>),
        rng: &mut ChaCha8Rng,
        device: &B::Device,
    ) -> Self {
        let (rows, dim) = (layout.rows(), model.common().embedding_dim as usize);
        let sizes = Sizes { fields: layout.categorical(), dim, dense: layout.denses() };
        let mut params = Params::new(device);
        let embeddings = params.add("embeddings", &[rows, dim], table);
        let linear = params.add("linear", &[rows, 1], vec![0.0; rows]);
        let bias = params.add("bias", &[1], vec![bias]);
        let dense = (sizes.dense > 0).then(|| params.add("dense", &[sizes.dense, 1], vec![0.0; sizes.dense]));
        let own = model.weights(sizes, &mut params, rng);
        Network {
            params,
            model: model.clone(),
            own,
            bias,
            linear,
            embeddings,
            dense,
            fields: sizes.fields,
            denses: layout.denses(),
        }
    }

    /// Ratings of a batch `[batch]`, not clipped, and what was read of the tables. `vars` are those of
    /// [`Network::params`], with gradients or without.
    pub fn forward<C: ModelBackend>(
        &self,
        vars: &Vars<C>,
        batch: &Batch,
        pass: &mut Pass<C>,
    ) -> (Tensor<C, 1>, Read<C>) {
        let (n, fields) = (batch.n, self.fields);
        let linear = vars.rows(self.linear, &batch.rows);
        let embeddings = vars.rows(self.embeddings, &batch.rows);
        let dim = embeddings.dims()[1];
        let device = embeddings.device();
        // Lists are pooled and rows repeated by one sparse product.
        let (offsets, places, shares) = (batch.offsets.clone(), batch.places.clone(), batch.shares.clone());
        let pool = SparseMatrix::new(Csr::from_rows(batch.rows.len(), offsets, places, shares), &device);
        let dense = (self.denses > 0)
            .then(|| Tensor::from_data(TensorData::new(batch.dense.clone(), [n, self.denses]), &device));
        let terms = pool.matmul(linear.clone()).reshape([n, fields]);
        let mut sum = vars.get::<1>(self.bias) + terms.matmul(Tensor::ones([fields, 1], &device)).reshape([n]);
        if let (Some(x), Some(id)) = (&dense, self.dense) {
            sum = sum + x.clone().matmul(vars.get::<2>(id)).reshape([n]);
        }
        let inputs = Inputs { embeddings: pool.matmul(embeddings.clone()).reshape([n, fields, dim]), dense };
        (sum + self.model.forward(&self.own, vars, &inputs, pass), (linear, embeddings))
    }

    /// Loss `[1]` of a batch with `ratings [batch]`.
    pub(super) fn loss<C: ModelBackend>(
        &self,
        vars: &Vars<C>,
        batch: &Batch,
        ratings: Vec<f32>,
        pass: &mut Pass<C>,
    ) -> Tensor<C, 1> {
        let n = batch.n;
        let (predicted, (linear, embeddings)) = self.forward(vars, batch, pass);
        let ratings = Tensor::<C, 1>::from_data(TensorData::new(ratings, [n]), &predicted.device());
        let mut loss = (predicted - ratings).powi_scalar(2).mean();
        let common = self.model.common();
        for (read, weight) in [(linear, common.l2_reg_linear), (embeddings, common.l2_reg_embedding)] {
            if weight > 0.0 {
                let [rows, dim] = read.dims();
                let squares = (read.clone() * read).matmul(Tensor::ones([dim, 1], &loss.device()));
                let counts = Tensor::from_data(TensorData::new(batch.counts.clone(), [1, rows]), &loss.device());
                loss = loss + counts.matmul(squares).reshape([1]) * (weight / n as f64);
            }
        }
        match self.model.penalty(&self.own, vars) {
            Some(penalty) => loss + penalty,
            None => loss,
        }
    }
}

/// Fits `model`.
///
/// # Errors
/// Those of [`Ratings::check`] and of [`trainer::run`].
pub fn fit<M: RatingModel>(model: &M, data: &Ratings<'_>, ctx: &FitContext<'_>) -> Result<RatingFit> {
    data.check()?;
    ctx.device.run(Task { model, data, ctx })
}

struct Task<'a, M> {
    model: &'a M,
    data: &'a Ratings<'a>,
    ctx: &'a FitContext<'a>,
}

impl<M: RatingModel> OnBackend for Task<'_, M> {
    type Output = Result<RatingFit>;

    fn on<B: ModelBackend>(self, device: &B::Device) -> Result<RatingFit> {
        let Task { model, data, ctx } = self;
        let recent_decay = model.common().recent_decay;
        let layout = Layout::new(data.fields, recent_decay > 0.0);
        let mut rng = ChaCha8Rng::seed_from_u64(ctx.seed);
        let n = data.train.len();
        let ratings = data.train_ratings;
        let mean = ratings.iter().map(|&r| f64::from(r)).sum::<f64>() / n.max(1) as f64;
        let range = ratings.iter().fold([f32::INFINITY, f32::NEG_INFINITY], |[a, b], &r| [a.min(r), b.max(r)]);
        let mut network = Network::<M, B>::new(model, &layout, mean as f32, &mut rng, device);
        forget_unseen(&mut network, &layout, data)?;
        let mut learner = RatingLearner {
            seed: ctx.seed,
            // Without train rows there is no range.
            range: if n == 0 { [f32::NEG_INFINITY, f32::INFINITY] } else { range },
            adam: Adam::new(model.common().schedule.learning_rate),
            recent: (recent_decay > 0.0).then(|| Recent::new(data, recent_decay)),
            network,
            scratch: layout.scratch(),
            layout,
            data,
        };
        let schedule = &model.common().schedule;
        let schedule = Schedule { epochs: if n == 0 { 0 } else { schedule.epochs }, ..schedule.clone() };
        let trained = trainer::run(&mut learner, &schedule, ctx)?;
        Ok(RatingFit { predictor: Box::new(trained.fitted), epochs: trained.epochs, best_epoch: trained.best_epoch })
    }
}

/// Sets the embeddings of values without a train row to 0.
fn forget_unseen<M: RatingModel, B: ModelBackend>(
    network: &mut Network<M, B>,
    layout: &Layout,
    data: &Ratings<'_>,
) -> Result<()> {
    let mut seen = vec![false; layout.rows()];
    let places: Vec<u32> = (0..data.train.len() as u32).collect();
    let mut scratch = layout.scratch();
    for chunk in places.chunks(1 << 16) {
        let source = Source { users: data.users, items: data.items, rows: data.train, recent: RecentOf::None };
        let batch = layout.batch(source, chunk, &mut scratch);
        batch.rows.iter().for_each(|&row| seen[row as usize] = true);
    }
    let mut tensors = network.params.tensors();
    for tensor in tensors.iter_mut().filter(|t| t.name == "embeddings") {
        let dim = tensor.shape[1];
        for (row, _) in seen.iter().enumerate().filter(|(_, seen)| !**seen) {
            tensor.values[row * dim..(row + 1) * dim].fill(0.0);
        }
    }
    network.params.set(&Tensors::new(tensors))
}

struct RatingLearner<'a, M: RatingModel, B: ModelBackend> {
    seed: u64,
    range: [f32; 2],
    adam: Adam,
    network: Network<M, B>,
    layout: Layout,
    scratch: Scratch,
    recent: Option<Recent>,
    data: &'a Ratings<'a>,
}

impl<M: RatingModel, B: ModelBackend> Learner for RatingLearner<'_, M, B> {
    type Fitted = Fitted<M>;

    fn epoch(&mut self, number: usize, watch: &dyn Watch) -> Result<f64> {
        let data = self.data;
        let mut order: Vec<u32> = (0..data.train.len() as u32).collect();
        order.shuffle(&mut epoch_rng(self.seed, number));
        let mut total = Tensor::<B, 1>::zeros([1], self.network.params.device());
        let size = self.network.model.common().schedule.batch_size as usize;
        for (step, places) in order.chunks(size).enumerate() {
            watch.check()?;
            let recent = self.recent.as_ref().map_or(RecentOf::None, |r| RecentOf::Rows(&r.rows));
            let source = Source { users: data.users, items: data.items, rows: data.train, recent };
            let batch = self.layout.batch(source, places, &mut self.scratch);
            let ratings = places.iter().map(|&p| data.train_ratings[p as usize]).collect();
            let mut pass = Pass::<Autodiff<B>>::training(self.seed, number, step);
            let vars = self.network.params.tracked();
            let loss = self.network.loss(&vars, &batch, ratings, &mut pass);
            total = total + self.network.params.step(loss, vars, &self.adam) * places.len() as f32;
            for (id, values) in pass.statistics {
                self.network.params.assign(id, values.inner());
            }
        }
        Ok(f64::from(total.into_scalar().elem::<f32>()) / order.len() as f64)
    }

    fn fitted(&self) -> Result<Fitted<M>> {
        let mut tensors = self.network.params.tensors();
        tensors.push(NamedTensor::new("rating_range", vec![2], self.range.to_vec()));
        if let Some(recent) = &self.recent {
            tensors.push(NamedTensor::new("recent", vec![recent.users.len()], recent.users.clone()));
        }
        Fitted::load(&self.network.model, self.data.fields, &Tensors::new(tensors))
    }

    fn quality(&self, fitted: &Fitted<M>) -> Option<f64> {
        let data = self.data;
        let predicted = fitted.predict(data.users, data.items, data.valid).ok()?;
        rmse(&predicted, data.valid_ratings).map(|e| -e)
    }

    fn tensors(fitted: &Fitted<M>) -> Vec<NamedTensor> {
        fitted.tensors()
    }

    fn load(&self, tensors: &Tensors) -> Result<Fitted<M>> {
        Fitted::load(&self.network.model, self.data.fields, tensors)
    }

    fn state(&self) -> Vec<NamedTensor> {
        self.network.params.state()
    }

    fn restore(&mut self, state: &Tensors) -> Result<()> {
        self.network.params.restore(state)
    }
}
