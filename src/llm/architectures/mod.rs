//! The decoder families that are computed here, one file each.
//!
//! In: a name (`model_type` of a `config.json`, `general.architecture` of a GGUF file). Out: what that family differs
//! in: defaults of its configuration, keys that it refuses, tensors that it has beside those of all families, the
//! order of its rows in GGUF files.
//!
//! A family is one file and one line of [`ALL`]. What both decoders must compute for it is said by flags of
//! [`super::config::LlamaConfig`], so that they ask for a bias, not for a name.

pub mod llama;
pub mod qwen2;
pub mod qwen3;

use super::config::{LlamaConfig, OnDisk};
use super::weights::{EMBEDDING, FINAL_NORM, HEAD};

/// One family of decoders: RMSNorm, rotary positions, grouped-query attention, SwiGLU, and what this one adds.
pub struct Architecture {
    /// `model_type` in `config.json` and `general.architecture` in GGUF; also the prefix of the GGUF keys.
    pub name: &'static str,
    /// The class in `architectures` of a `config.json` without `model_type`.
    pub class: &'static str,
    /// Whether GGUF files hold the rows of queries and keys as neighbouring pairs, not as halves of a head.
    pub pairs_in_gguf: bool,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether every head of queries and keys is normalised before its rotation.
    pub qk_norm: bool,
    /// Width of a head where the configuration has none: `None` for hidden size by heads.
    pub head_dim: Option<usize>,
    /// Context length where the configuration has none.
    pub context: usize,
    /// Refuses, in words, what this family's configuration may ask for and the decoders do not do.
    pub refuse: fn(&OnDisk) -> Result<(), String>,
}

/// All families, in the order in which messages name them.
pub const ALL: &[&Architecture] = &[&llama::ARCHITECTURE, &qwen2::ARCHITECTURE, &qwen3::ARCHITECTURE];

impl Architecture {
    /// The family with a name.
    pub fn find(name: &str) -> Option<&'static Architecture> {
        ALL.iter().find(|a| a.name == name).copied()
    }

    /// The family with a class of transformers.
    pub fn of_class(class: &str) -> Option<&'static Architecture> {
        ALL.iter().find(|a| a.class == class).copied()
    }

    /// The names of all, for messages.
    pub fn names() -> String {
        ALL.iter().map(|a| format!("`{}`", a.name)).collect::<Vec<_>>().join(", ")
    }
}

impl PartialEq for Architecture {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl std::fmt::Debug for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// A tensor by both of its names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorName {
    /// In a Hugging Face folder, e.g. `model.layers.0.self_attn.q_proj.weight`.
    pub hf: String,
    /// In a GGUF file, e.g. `blk.0.attn_q.weight`.
    pub gguf: String,
    /// Sizes, slowest first.
    pub shape: Vec<usize>,
}

/// A tensor of a layer: its name in a Hugging Face folder and in a GGUF file, which models have it, its sizes.
type LayerTensor = (&'static str, &'static str, fn(&LlamaConfig) -> bool, fn(&LlamaConfig) -> Vec<usize>);

/// Names of a layer's tensors in both worlds (llama.cpp, `gguf-py/gguf/tensor_mapping.py`), which families have them, sizes.
const LAYER: &[LayerTensor] = &[
    ("input_layernorm.weight", "attn_norm.weight", |_| true, |c| vec![c.hidden]),
    ("self_attn.q_proj.weight", "attn_q.weight", |_| true, |c| vec![c.q_width(), c.hidden]),
    ("self_attn.k_proj.weight", "attn_k.weight", |_| true, |c| vec![c.kv_width(), c.hidden]),
    ("self_attn.v_proj.weight", "attn_v.weight", |_| true, |c| vec![c.kv_width(), c.hidden]),
    ("self_attn.q_proj.bias", "attn_q.bias", |c| c.qkv_bias, |c| vec![c.q_width()]),
    ("self_attn.k_proj.bias", "attn_k.bias", |c| c.qkv_bias, |c| vec![c.kv_width()]),
    ("self_attn.v_proj.bias", "attn_v.bias", |c| c.qkv_bias, |c| vec![c.kv_width()]),
    ("self_attn.q_norm.weight", "attn_q_norm.weight", |c| c.qk_norm, |c| vec![c.head_dim]),
    ("self_attn.k_norm.weight", "attn_k_norm.weight", |c| c.qk_norm, |c| vec![c.head_dim]),
    ("self_attn.o_proj.weight", "attn_output.weight", |_| true, |c| vec![c.hidden, c.q_width()]),
    ("post_attention_layernorm.weight", "ffn_norm.weight", |_| true, |c| vec![c.hidden]),
    ("mlp.gate_proj.weight", "ffn_gate.weight", |_| true, |c| vec![c.intermediate, c.hidden]),
    ("mlp.up_proj.weight", "ffn_up.weight", |_| true, |c| vec![c.intermediate, c.hidden]),
    ("mlp.down_proj.weight", "ffn_down.weight", |_| true, |c| vec![c.hidden, c.intermediate]),
];

/// Every tensor that the decoder of a configuration reads; one after the other, since a damaged file may announce
/// thousands of layers that it does not have.
pub fn tensors(c: &LlamaConfig) -> impl Iterator<Item = TensorName> + '_ {
    let whole = |hf: &str, shape| TensorName { hf: hf.to_owned(), gguf: gguf_name(hf), shape };
    let mut out = vec![whole(EMBEDDING, vec![c.vocab_size, c.hidden]), whole(FINAL_NORM, vec![c.hidden])];
    if !c.tied {
        out.push(whole(HEAD, vec![c.vocab_size, c.hidden]));
    }
    let layers = (0..c.layers).flat_map(move |layer| {
        LAYER.iter().filter(|(_, _, has, _)| has(c)).map(move |(hf, gguf, _, shape)| TensorName {
            hf: format!("model.layers.{layer}.{hf}"),
            gguf: format!("blk.{layer}.{gguf}"),
            shape: shape(c),
        })
    });
    out.into_iter().chain(layers)
}

/// GGUF's name of a Hugging Face tensor; the name itself where GGUF has none.
pub fn gguf_name(name: &str) -> String {
    match name {
        EMBEDDING => return "token_embd.weight".to_owned(),
        FINAL_NORM => return "output_norm.weight".to_owned(),
        HEAD => return "output.weight".to_owned(),
        _ => {}
    }
    let found = name.strip_prefix("model.layers.").and_then(|rest| {
        let (layer, leaf) = rest.split_once('.')?;
        let (_, gguf, _, _) = LAYER.iter().find(|(hf, ..)| *hf == leaf)?;
        Some(format!("blk.{layer}.{gguf}"))
    });
    found.unwrap_or_else(|| name.to_owned())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::{Path, PathBuf};

    use serde_json::{Value as Json, json};

    use super::*;
    use crate::llm::cpu::CpuModel;
    use crate::llm::cpu::kernels::Isa;
    use crate::llm::engine::{Engine, Local};
    use crate::llm::model::{BurnModel, Placement};
    use crate::llm::options::LlmOptions;
    use crate::llm::rope::RopeScaling;
    use crate::llm::weights::Weights;

    #[test]
    fn names_of_both_worlds() {
        assert_eq!(gguf_name("model.layers.12.self_attn.q_proj.weight"), "blk.12.attn_q.weight");
        assert_eq!(gguf_name("model.layers.3.self_attn.v_proj.bias"), "blk.3.attn_v.bias");
        assert_eq!(gguf_name("model.layers.0.input_layernorm.weight"), "blk.0.attn_norm.weight");
        assert_eq!(gguf_name(EMBEDDING), "token_embd.weight");
        assert_eq!(gguf_name("model.layers.x"), "model.layers.x");
    }

    #[test]
    fn every_family_is_found_by_both_names() {
        for a in ALL {
            assert_eq!(Architecture::find(a.name), Some(*a));
            assert_eq!(Architecture::of_class(a.class), Some(*a));
        }
        assert_eq!(Architecture::names(), "`llama`, `qwen2`, `qwen3`");
    }

    /// The folders and GGUF files that `peers/golden_llm.py` made with transformers, and what it made them for.
    const CASES: [&str; 7] = ["llama2", "llama3", "llama_linear", "qwen2", "qwen2_untied", "qwen3", "qwen3_untied"];

    fn golden(case: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llm").join(case)
    }

    /// The largest distance to the logits of `golden.json` (or of an entry of it), by both decoders.
    pub(crate) fn worst(path: &Path, want: &Json) -> f64 {
        let weights = Weights::open(path).unwrap();
        let cpu = Local::new(CpuModel::load(&weights, Isa::detect()).unwrap(), LlmOptions::default());
        let placement = Placement { half: false, gpu: false };
        let burn = BurnModel::<burn::backend::Flex>::load(&weights, &Default::default(), placement).unwrap();
        let burn = Local::new(burn, LlmOptions::default());
        let ids: Vec<u32> = serde_json::from_value(want["ids"].clone()).unwrap();
        let rows: Vec<Vec<f64>> = serde_json::from_value(want["logits"].clone()).unwrap();
        let positions: Vec<usize> = serde_json::from_value(want["positions"].clone()).unwrap();
        assert!(positions.len() == rows.len() && !rows.is_empty());
        let mut worst = 0f64;
        for (position, row) in positions.into_iter().zip(rows) {
            for got in [cpu.logits(&ids[..=position]).unwrap(), burn.logits(&ids[..=position]).unwrap()] {
                assert_eq!(got.len(), row.len());
                let far = got.iter().zip(&row).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
                worst = worst.max(far);
            }
        }
        worst
    }

    #[test]
    fn both_decoders_give_the_logits_of_transformers_from_both_formats() {
        for case in CASES {
            let want: Json = serde_json::from_slice(&std::fs::read(golden(case).join("golden.json")).unwrap()).unwrap();
            for path in [golden(case), golden(case).join("model.gguf")] {
                let worst = worst(&path, &want);
                assert!(worst < 1e-4, "{}: {worst}", path.display());
            }
            let config = |path: &Path| Weights::open(path).unwrap().config().clone();
            let (folder, file) = (config(&golden(case)), config(&golden(case).join("model.gguf")));
            // The one thing that the formats say differently, and what a GGUF names beside.
            let file = LlamaConfig { rope_scaling: folder.rope_scaling.clone(), ..file };
            assert_eq!(folder, file, "{case}");
        }
    }

    /// Leaving out what is special about a family changes logits by far more than the tolerance: the goldens see it.
    #[test]
    fn the_goldens_see_what_is_special() {
        for (case, spoil) in [
            ("llama3", (|c| c.rope_scaling = RopeScaling::None) as fn(&mut LlamaConfig)),
            ("llama_linear", |c| c.rope_scaling = RopeScaling::None),
            ("qwen2", |c| c.qkv_bias = false),
            ("qwen3", |c| c.qk_norm = false),
            ("qwen2", |c| c.rope_theta = 1e4),
        ] {
            let want: Json = serde_json::from_slice(&std::fs::read(golden(case).join("golden.json")).unwrap()).unwrap();
            let mut weights = Weights::open(&golden(case)).unwrap();
            spoil(weights.config_mut());
            let model = Local::new(CpuModel::load(&weights, Isa::detect()).unwrap(), LlmOptions::default());
            let ids: Vec<u32> = serde_json::from_value(want["ids"].clone()).unwrap();
            let got = model.logits(&ids).unwrap();
            let row: Vec<f64> =
                serde_json::from_value(want["logits"].as_array().unwrap().last().unwrap().clone()).unwrap();
            let far = got.iter().zip(&row).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
            assert!(far > 1e-2, "{case}: {far}");
        }
    }

    #[test]
    fn blocks_are_the_values_as_stored() {
        for path in [golden("llama2"), golden("llama2/model.gguf"), golden("qwen3/model.gguf"), golden("tiny")] {
            let weights = Weights::open(&path).unwrap();
            for t in tensors(weights.config()) {
                let blocks = weights.blocks(&t.hf).unwrap();
                assert_eq!(blocks.bytes.len(), blocks.rows * blocks.row_bytes(), "{}", t.hf);
                assert_eq!(
                    (blocks.rows, Some(&blocks.columns)),
                    (t.shape.iter().rev().skip(1).product(), t.shape.last())
                );
                let mut values = vec![0f32; blocks.rows * blocks.columns];
                blocks.block_type.dequantize(&blocks.bytes, &mut values);
                assert_eq!(values, weights.values(&t.hf).unwrap(), "{}", t.hf);
            }
            assert!(weights.blocks("model.layers.9.mlp.up_proj.weight").is_err());
        }
    }

    #[test]
    fn a_configuration_that_asks_for_more_is_refused_by_name() {
        let base: Json = serde_json::from_slice(&std::fs::read(golden("qwen2/config.json")).unwrap()).unwrap();
        LlamaConfig::from_hf_bytes(base.to_string().as_bytes()).unwrap();
        for (key, value, word) in [
            ("model_type", json!("gemma2"), "`gemma2`"),
            ("architectures", json!(["Qwen2ForSequenceClassification"]), "Qwen2ForSequenceClassification"),
            ("use_sliding_window", json!(true), "use_sliding_window"),
            ("layer_types", json!(["full_attention", "sliding_attention"]), "layer_types"),
            ("hidden_act", json!("gelu"), "`gelu`"),
            ("partial_rotary_factor", json!(0.5), "partial_rotary_factor"),
            ("quantization_config", json!({"quant_method": "gptq"}), "quantization_config"),
            ("num_experts", json!(8), "num_experts"),
            ("rope_parameters", json!({"rope_type": "yarn", "factor": 2.0}), "`yarn`"),
            ("rope_parameters", json!({"rope_type": "default", "mrope_section": [2, 1, 1]}), "mrope_section"),
        ] {
            let mut config = base.clone();
            config[key] = value;
            if key == "use_sliding_window" {
                config["max_window_layers"] = json!(1);
            }
            let error = LlamaConfig::from_hf_bytes(config.to_string().as_bytes()).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        // The older spelling, and windows that no layer has.
        let mut config = base.clone();
        let table = config.as_object_mut().unwrap();
        table.remove("rope_parameters");
        table.insert("rope_theta".into(), json!(5e5));
        table.insert("rope_scaling".into(), json!({"type": "linear", "factor": 2.0}));
        table.insert("use_sliding_window".into(), json!(true));
        table.insert("max_window_layers".into(), json!(2));
        let read = LlamaConfig::from_hf_bytes(config.to_string().as_bytes()).unwrap();
        assert_eq!((read.rope_theta, read.rope_scaling), (5e5, RopeScaling::Linear(2.0)));
    }
}
