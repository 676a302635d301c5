//! Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): `W x + alpha / rank B A x`, with W as it was.
//!
//! In: a rank, alpha, the layers' matrices by name. Out: an [`Adapter`], whose weights are in [`Params`] of their own, and
//! the matrices that it adds to, merged.

use burn::tensor::backend::Backend;
use rand::Rng;

use super::peft::LoraFile;
use super::seeds;
use crate::error::{Error, Result};
use crate::llm::config::LlamaConfig;
use crate::llm::weights::layer_tensor;
use crate::recommenders::optim::{ParamId, Params};

/// A matrix of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// `q_proj`.
    Query,
    /// `k_proj`.
    Key,
    /// `v_proj`.
    Value,
    /// `o_proj`.
    Output,
    /// `gate_proj`.
    Gate,
    /// `up_proj`.
    Up,
    /// `down_proj`.
    Down,
}

impl Target {
    /// All, in the order of [`Target::number`].
    pub const ALL: [Target; 7] =
        [Target::Query, Target::Key, Target::Value, Target::Output, Target::Gate, Target::Up, Target::Down];

    /// Its place in [`Target::ALL`].
    pub fn number(self) -> usize {
        self as usize
    }

    /// Its path within a layer, e.g. `self_attn.q_proj`.
    pub fn leaf(self) -> &'static str {
        match self {
            Target::Query => "self_attn.q_proj",
            Target::Key => "self_attn.k_proj",
            Target::Value => "self_attn.v_proj",
            Target::Output => "self_attn.o_proj",
            Target::Gate => "mlp.gate_proj",
            Target::Up => "mlp.up_proj",
            Target::Down => "mlp.down_proj",
        }
    }

    /// Its name, e.g. `q_proj`.
    pub fn name(self) -> &'static str {
        self.leaf().rsplit('.').next().unwrap_or_default()
    }

    /// The matrix of that name.
    ///
    /// # Errors
    /// There is none (exit 78).
    pub fn named(name: &str) -> Result<Target> {
        Self::ALL.into_iter().find(|t| t.name() == name).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|t| t.name()).collect();
            Error::spec(format!("`{name}` is no matrix of a layer ({} are)", names.join(", ")))
        })
    }

    /// `[outputs, inputs]`.
    pub fn shape(self, c: &LlamaConfig) -> [usize; 2] {
        match self {
            Target::Query => [c.q_width(), c.hidden],
            Target::Key | Target::Value => [c.kv_width(), c.hidden],
            Target::Output => [c.hidden, c.q_width()],
            Target::Gate | Target::Up => [c.intermediate, c.hidden],
            Target::Down => [c.hidden, c.intermediate],
        }
    }
}

/// The shape of an adapter, and where its weights are in some [`Params`].
#[derive(Clone, Debug)]
pub struct Adapter {
    rank: usize,
    alpha: f64,
    /// Per layer, by [`Target`]: A `[rank, inputs]` and B `[outputs, rank]`.
    pairs: Vec<[Option<[ParamId; 2]>; 7]>,
}

/// The name of an adapter's matrix, e.g. `model.layers.0.self_attn.q_proj.lora_A.weight`.
pub fn pair_names(layer: usize, target: Target) -> [String; 2] {
    ["lora_A", "lora_B"].map(|part| layer_tensor(layer, &format!("{}.{part}", target.leaf())))
}

impl Adapter {
    /// A new adapter, which changes nothing yet: A is drawn from U(-1 / sqrt(inputs), 1 / sqrt(inputs)), as PEFT does it, and B is 0.
    ///
    /// # Errors
    /// A rank or alpha that can't be (exit 78).
    pub fn new<B: Backend>(
        config: &LlamaConfig,
        (rank, alpha): (usize, f64),
        targets: &[Target],
        seed: u64,
        params: &mut Params<B>,
    ) -> Result<Self> {
        let mut rng = seeds::stream(seed, "lora");
        let mut make = |target: Target| {
            let [outputs, inputs] = target.shape(config);
            let bound = 1.0 / (inputs as f32).sqrt();
            [(0..rank * inputs).map(|_| rng.random_range(-bound..bound)).collect(), vec![0f32; outputs * rank]]
        };
        Self::build(config, (rank, alpha), targets, params, &mut |_, target| Ok(make(target)))
    }

    /// An adapter with the matrices A and B that `make(layer, target)` gives.
    ///
    /// # Errors
    /// What `make` returns; a rank or alpha that can't be (exit 78).
    pub fn build<B: Backend>(
        config: &LlamaConfig,
        (rank, alpha): (usize, f64),
        targets: &[Target],
        params: &mut Params<B>,
        make: &mut dyn FnMut(usize, Target) -> Result<[Vec<f32>; 2]>,
    ) -> Result<Self> {
        if rank == 0 || rank > config.hidden || !(alpha.is_finite() && alpha > 0.0) || targets.is_empty() {
            return Err(Error::spec(format!(
                "an adapter of rank {rank} and alpha {alpha} for {} matrices cannot be",
                targets.len()
            ))
            .with_help(format!("`rank` is 1 to {}, `alpha` above 0, `targets` at least one matrix", config.hidden)));
        }
        let mut pairs = vec![[None; 7]; config.layers];
        for (layer, pairs) in pairs.iter_mut().enumerate() {
            for &target in targets {
                let ([outputs, inputs], [a, b]) = (target.shape(config), make(layer, target)?);
                let [name_a, name_b] = pair_names(layer, target);
                let ids = [params.add(&name_a, &[rank, inputs], a), params.add(&name_b, &[outputs, rank], b)];
                pairs[target.number()] = Some(ids);
            }
        }
        Ok(Adapter { rank, alpha, pairs })
    }

    /// An adapter that was read from files, to be learned further.
    ///
    /// # Errors
    /// It is of another model (exit 65).
    pub fn of_file<B: Backend>(config: &LlamaConfig, file: &LoraFile, params: &mut Params<B>) -> Result<Self> {
        file.check(config)?;
        let mut pairs = vec![[None; 7]; config.layers];
        for ((layer, target), pair) in &file.pairs {
            let ids = pair.each_ref().map(|t| params.add(&t.name, &t.shape, t.values.clone()));
            pairs[*layer][target.number()] = Some(ids);
        }
        Ok(Adapter { rank: file.rank, alpha: file.scale * file.rank as f64, pairs })
    }

    /// Rows of A.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Numerator of the scale.
    pub fn alpha(&self) -> f64 {
        self.alpha
    }

    /// What B A x is multiplied by.
    pub fn scale(&self) -> f32 {
        (self.alpha / self.rank as f64) as f32
    }

    /// A and B of a matrix, where it has them.
    pub fn pair(&self, layer: usize, target: Target) -> Option<[ParamId; 2]> {
        self.pairs.get(layer)?[target.number()]
    }

    /// The matrices that it adds to.
    pub fn targets(&self) -> Vec<Target> {
        let has = |t: &Target| self.pairs.iter().any(|p| p[t.number()].is_some());
        Target::ALL.into_iter().filter(has).collect()
    }
}
