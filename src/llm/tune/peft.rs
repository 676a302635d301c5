//! Adapters as files, in the format of PEFT: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! In: a folder or named files. Out: [`LoraFile`], which adds itself to the matrices of its base; and back, so that `peft` loads
//! what was learned here. What PEFT can do besides plain LoRA (DoRA, ranks per matrix, biases, further modules) is refused by name,
//! since leaving it out would give wrong numbers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use bytes::Bytes;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value as Json, json};

use super::lora::{Target, pair_names};
use crate::error::{Error, Result};
use crate::llm::config::LlamaConfig;
use crate::recommenders::saved::{NamedTensor, write_f32};

/// What an adapter is.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Its weights.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// What PEFT puts before the names of the model's own modules.
const PREFIX: &str = "base_model.model.";

/// An adapter on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraFile {
    /// Rows of A.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// What B A is multiplied by.
    pub scale: f64,
    /// A `[rank, inputs]` and B `[outputs, rank]` by layer and matrix.
    pub pairs: BTreeMap<(usize, Target), [NamedTensor; 2]>,
}

fn fault(file: &str, what: impl std::fmt::Display) -> Error {
    Error::data(format!("the adapter's `{file}`: {what}"))
}

impl LoraFile {
    /// Whether a folder holds an adapter.
    pub fn is_there(folder: &Path) -> bool {
        folder.join(CONFIG_FILE).is_file()
    }

    /// Reads a folder.
    ///
    /// # Errors
    /// Exit 65 where a file is missing, damaged, or of a kind of adapter that is not plain LoRA.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        for name in [CONFIG_FILE, WEIGHTS_FILE] {
            let path = folder.join(name);
            let bytes = fs_err::read(&path).map_err(|e| Error::data("cannot read the adapter").because(e))?;
            files.insert(name.to_owned(), Bytes::from(bytes));
        }
        Self::from_files(&files).map_err(|e| e.at(folder.display().to_string()))
    }

    /// Reads named files.
    ///
    /// # Errors
    /// As [`LoraFile::open`].
    pub fn from_files(files: &BTreeMap<String, Bytes>) -> Result<Self> {
        let file = |name: &str| files.get(name).ok_or_else(|| fault(name, "it is missing"));
        let config: Json = serde_json::from_slice(file(CONFIG_FILE)?).map_err(|e| fault(CONFIG_FILE, e))?;
        let (rank, alpha, scale) = settings(&config).map_err(|what| {
            fault(CONFIG_FILE, what)
                .with_help("merge the adapter with peft (`merge_and_unload`) and use the merged model")
        })?;
        let bytes = file(WEIGHTS_FILE)?;
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| fault(WEIGHTS_FILE, e))?;
        let mut pairs = BTreeMap::<(usize, Target), [Option<NamedTensor>; 2]>::new();
        for (name, view) in tensors.tensors() {
            let unknown = || fault(WEIGHTS_FILE, format!("the tensor `{name}` has no place in a decoder's layer"));
            let own = name.strip_prefix(PREFIX).unwrap_or(&name);
            let (layer, target, part) = place(own).ok_or_else(unknown)?;
            let values = f32_values(view.dtype(), view.data())
                .ok_or_else(|| fault(WEIGHTS_FILE, format!("`{name}` is neither float32, float16 nor bfloat16")))?;
            if let Some(at) = values.iter().position(|x| !x.is_finite()) {
                return Err(fault(WEIGHTS_FILE, format!("value {at} of `{name}` is {}", values[at])));
            }
            let shape = view.shape().to_vec();
            let of_rank = shape.len() == 2 && shape[part] == rank;
            if !of_rank {
                return Err(fault(WEIGHTS_FILE, format!("`{name}` has the sizes {shape:?}, but the rank is {rank}")));
            }
            let tensor = NamedTensor::new(&pair_names(layer, target)[part], shape, values);
            pairs.entry((layer, target)).or_default()[part] = Some(tensor);
        }
        let whole = |((layer, target), [a, b]): ((usize, Target), [Option<NamedTensor>; 2])| match (a, b) {
            (Some(a), Some(b)) => Ok(((layer, target), [a, b])),
            _ => Err(fault(WEIGHTS_FILE, format!("layer {layer} has only one half of `{}`", target.name()))),
        };
        let pairs = pairs.into_iter().map(whole).collect::<Result<BTreeMap<_, _>>>()?;
        if pairs.is_empty() {
            return Err(fault(WEIGHTS_FILE, "it has no tensors"));
        }
        Ok(LoraFile { rank, alpha, scale, pairs })
    }

    /// An adapter of tensors that are named as [`pair_names`] names them.
    ///
    /// # Errors
    /// Only our bugs.
    pub fn of_tensors(rank: usize, alpha: f64, tensors: Vec<NamedTensor>) -> Result<Self> {
        let mut by_name: BTreeMap<String, NamedTensor> = tensors.into_iter().map(|t| (t.name.clone(), t)).collect();
        let mut pairs = BTreeMap::new();
        let places: BTreeSet<_> = by_name.keys().filter_map(|name| place(name)).map(|(l, t, _)| (l, t)).collect();
        for (layer, target) in places {
            let [a, b] = pair_names(layer, target).map(|name| by_name.remove(&name));
            let pair = a.zip(b).ok_or_else(|| Error::internal("half of an adapter's matrix"))?;
            pairs.insert((layer, target), [pair.0, pair.1]);
        }
        Ok(LoraFile { rank, alpha, scale: alpha / rank as f64, pairs })
    }

    /// As files that PEFT loads. `base` is the name of the model that it was learned on, `dropout` what was dropped meanwhile.
    ///
    /// # Errors
    /// Only our bugs.
    pub fn to_files(&self, base: &str, dropout: f32) -> Result<BTreeMap<String, Bytes>> {
        let targets: BTreeSet<&str> = self.pairs.keys().map(|(_, target)| target.name()).collect();
        let config = json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": true,
            "r": self.rank, "lora_alpha": self.alpha, "lora_dropout": dropout, "target_modules": targets, "bias": "none",
            "fan_in_fan_out": false, "init_lora_weights": true, "use_rslora": false, "use_dora": false,
            "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": null,
        });
        let config = serde_json::to_vec_pretty(&config).map_err(|e| Error::internal("no JSON").because(e))?;
        let renamed = |t: &NamedTensor| NamedTensor { name: format!("{PREFIX}{}", t.name), ..t.clone() };
        let tensors: Vec<NamedTensor> = self.pairs.values().flatten().map(renamed).collect();
        Ok(BTreeMap::from([
            (CONFIG_FILE.to_owned(), Bytes::from(config)),
            (WEIGHTS_FILE.to_owned(), Bytes::from(write_f32(&tensors)?)),
        ]))
    }

    /// Whether it fits a model: its layers are there, and its matrices have the model's sizes.
    ///
    /// # Errors
    /// It doesn't (exit 65).
    pub fn check(&self, config: &LlamaConfig) -> Result<()> {
        for ((layer, target), [a, b]) in &self.pairs {
            let [outputs, inputs] = target.shape(config);
            if *layer >= config.layers || a.shape[1] != inputs || b.shape[0] != outputs {
                return Err(fault(
                    WEIGHTS_FILE,
                    format!("`{}` of layer {layer} is [{}, {}]", target.name(), b.shape[0], a.shape[1]),
                )
                .with_help("the adapter was learned on another model than the one that it is opened with"));
            }
        }
        Ok(())
    }

    /// Adds what the adapter has for the tensor `name` (`model.layers.0.self_attn.q_proj.weight`), row by row; nothing where it has nothing.
    ///
    /// # Panics
    /// When the values are not of the matrix's size, which [`LoraFile::check`] tells (our bug).
    pub fn add_to(&self, name: &str, values: &mut [f32]) {
        let Some([a, b]) = self.of(name) else { return };
        let inputs = a.shape[1];
        assert_eq!(values.len(), b.shape[0] * inputs, "`{name}` is not of the adapter's size");
        for (row, factors) in values.chunks_exact_mut(inputs).zip(b.values.chunks_exact(self.rank)) {
            for (factor, a) in factors.iter().zip(a.values.chunks_exact(inputs)) {
                let factor = (f64::from(*factor) * self.scale) as f32;
                row.iter_mut().zip(a).for_each(|(w, a)| *w += factor * a);
            }
        }
    }

    /// A and B of a tensor.
    pub fn of(&self, name: &str) -> Option<&[NamedTensor; 2]> {
        let rest = name.strip_prefix("model.layers.")?.strip_suffix(".weight")?;
        let (layer, leaf) = rest.split_once('.')?;
        let target = Target::ALL.into_iter().find(|t| t.leaf() == leaf)?;
        self.pairs.get(&(layer.parse().ok()?, target))
    }
}

/// Layer, matrix and half of a tensor's name without its prefix.
fn place(name: &str) -> Option<(usize, Target, usize)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (rest, part) = match rest.strip_suffix(".lora_A.weight") {
        Some(rest) => (rest, 0),
        None => (rest.strip_suffix(".lora_B.weight")?, 1),
    };
    let target = Target::ALL.into_iter().find(|t| t.leaf() == rest)?;
    Some((layer.parse().ok()?, target, part))
}

/// Rank, alpha and scale of a configuration; what is not plain LoRA is named.
fn settings(config: &Json) -> Result<(usize, f64, f64), String> {
    let set = |key: &str| match &config[key] {
        Json::Null | Json::Bool(false) => false,
        Json::Object(map) => !map.is_empty(),
        Json::Array(list) => !list.is_empty(),
        _ => true,
    };
    if config["peft_type"].as_str().is_some_and(|t| t != "LORA") {
        return Err(format!("the kind {} is not supported (LORA is)", config["peft_type"]));
    }
    if config["bias"].as_str().is_some_and(|b| b != "none") {
        return Err("learned biases are not supported".to_owned());
    }
    let unsupported = [
        "use_dora",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "layer_replication",
        "lora_bias",
        "trainable_token_indices",
        "target_parameters",
        "use_qalora",
        "use_bdlora",
        "alora_invocation_tokens",
    ];
    if let Some(key) = unsupported.into_iter().find(|key| set(key)) {
        return Err(format!("`{key}` is not supported"));
    }
    let rank = config["r"].as_u64().filter(|r| (1..=1 << 20).contains(r)).ok_or("`r` is no rank")? as usize;
    let alpha = config["lora_alpha"].as_f64().filter(|a| a.is_finite()).ok_or("`lora_alpha` is no number")?;
    // Kalajdzievski 2023, arXiv 2312.03732.
    let by = if set("use_rslora") { (rank as f64).sqrt() } else { rank as f64 };
    Ok((rank, alpha, alpha / by))
}

fn f32_values(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    Some(match dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Dtype::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter() -> LoraFile {
        let [a, b] = pair_names(1, Target::Value);
        let a = NamedTensor::new(&a, vec![2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let b = NamedTensor::new(&b, vec![2, 2], vec![1.0, 0.0, 0.5, -1.0]);
        LoraFile::of_tensors(2, 4.0, vec![b, a]).unwrap()
    }

    #[test]
    fn files_give_back_the_adapter() {
        let files = adapter().to_files("base", 0.1).unwrap();
        assert_eq!(LoraFile::from_files(&files).unwrap(), adapter());
        let header = String::from_utf8_lossy(&files[WEIGHTS_FILE]);
        assert!(header.contains("base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"));
    }

    #[test]
    fn it_adds_the_scaled_product() {
        let mut values = vec![1.0; 6];
        adapter().add_to("model.layers.1.self_attn.v_proj.weight", &mut values);
        assert_eq!(values, [3.0, 5.0, 7.0, -6.0, -7.0, -8.0]);
        let mut others = vec![1.0; 6];
        adapter().add_to("model.layers.0.self_attn.v_proj.weight", &mut others);
        adapter().add_to("model.norm.weight", &mut others);
        assert_eq!(others, [1.0; 6]);
    }

    #[test]
    fn what_is_not_plain_lora_is_refused_by_name() {
        let files = adapter().to_files("base", 0.0).unwrap();
        let with = |key: &str, value: Json| {
            let mut config: Json = serde_json::from_slice(&files[CONFIG_FILE]).unwrap();
            config[key] = value;
            let mut files = files.clone();
            files.insert(CONFIG_FILE.to_owned(), serde_json::to_vec(&config).unwrap().into());
            LoraFile::from_files(&files)
        };
        for (key, value) in [
            ("use_dora", json!(true)),
            ("rank_pattern", json!({"q_proj": 3})),
            ("modules_to_save", json!(["lm_head"])),
            ("bias", json!("all")),
            ("peft_type", json!("IA3")),
            ("r", json!(0)),
            ("r", json!(3)),
            ("lora_alpha", json!("x")),
        ] {
            let error = with(key, value).unwrap_err();
            assert_eq!(error.fault.exit_code(), 65, "{key}");
        }
        let rooted = with("use_rslora", json!(true)).unwrap();
        assert!((rooted.scale - 4.0 / 2f64.sqrt()).abs() < 1e-12);
        let mut cut = files.clone();
        cut.insert(WEIGHTS_FILE.to_owned(), files[WEIGHTS_FILE].slice(..40));
        assert_eq!(LoraFile::from_files(&cut).unwrap_err().fault.exit_code(), 65);
        assert_eq!(LoraFile::from_files(&BTreeMap::new()).unwrap_err().fault.exit_code(), 65);
    }
}
