//! A model as the files of a Hugging Face folder, which `transformers` and this program load.
//!
//! In: its shape, its tensors, its tokenizer. Out: `config.json`, `model.safetensors` (f32), `generation_config.json`, and
//! the tokenizer's files. A folder that the model was tuned from gives its own tokenizer files and configuration unchanged.

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use serde_json::{Value as Json, json};

use crate::error::{Error, Result};
use crate::llm::architectures::tensors;
use crate::llm::chat::ChatTokenizer;
use crate::llm::config::LlamaConfig;
use crate::llm::rope::RopeScaling;
use crate::llm::weights::{Weights, is_folder};
use crate::recommenders::saved::{NamedTensor, write_f32};

/// What a folder says of its tokenizer.
const TOKENIZER_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
];

/// `config.json` of a shape.
///
/// # Errors
/// Rotary frequencies that a GGUF file gives one by one, which `config.json` has no word for (exit 65).
pub fn config_json(c: &LlamaConfig) -> Result<Json> {
    let mut config = json!({
        "architectures": [c.architecture.class], "model_type": c.architecture.name, "dtype": "float32", "torch_dtype": "float32",
        "vocab_size": c.vocab_size, "hidden_size": c.hidden, "intermediate_size": c.intermediate,
        "num_hidden_layers": c.layers, "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim, "max_position_embeddings": c.context, "rms_norm_eps": decimal(c.rms_eps),
        "rope_theta": c.rope_theta, "tie_word_embeddings": c.tied, "hidden_act": "silu",
        "attention_bias": false, "mlp_bias": false,
    });
    match &c.rope_scaling {
        RopeScaling::None => {}
        RopeScaling::Linear(factor) => config["rope_scaling"] = json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low, high, original_context } => {
            config["rope_scaling"] = json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": *original_context as u64,
            });
        }
        RopeScaling::Factors(_) => {
            return Err(Error::data("the GGUF file gives the rotary frequencies one by one; `config.json` has no word for that")
                .with_help("tune the model's Hugging Face folder instead of its GGUF file, or save an adapter (`method = \"lora\"`)"));
        }
    }
    if let Some(bos) = c.bos {
        config["bos_token_id"] = json!(bos);
    }
    match c.eos.as_slice() {
        [] => {}
        [one] => config["eos_token_id"] = json!(one),
        many => config["eos_token_id"] = json!(many),
    }
    Ok(config)
}

/// The shortest decimal number that is this f32: 1e-5, not .000009999999747378752.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

/// A whole model as files. `tensors` are under their Hugging Face names; `source` is the file or folder that it was tuned from.
///
/// # Errors
/// A file of the source can't be read (exit 65); as [`config_json`].
pub fn model_files(config: &LlamaConfig, tensors: &[NamedTensor], source: &Path) -> Result<BTreeMap<String, Bytes>> {
    let mut files = BTreeMap::new();
    files.insert("model.safetensors".to_owned(), Bytes::from(write_f32(tensors)?));
    let mut json = config_json(config);
    if is_folder(source) {
        for name in TOKENIZER_FILES {
            let path = source.join(name);
            if path.is_file() {
                let bytes =
                    fs_err::read(&path).map_err(|e| Error::data("cannot read the model's folder").because(e))?;
                files.insert(name.to_owned(), Bytes::from(bytes));
            }
        }
        // Its own, with whatever it says besides; the weights are f32 and perhaps fewer layers.
        let bytes = fs_err::read(source.join("config.json"))
            .map_err(|e| Error::data("cannot read the model's configuration").because(e))?;
        let mut own: Json = serde_json::from_slice(&bytes)
            .map_err(|e| Error::data(format!("{}: not JSON", source.join("config.json").display())).because(e))?;
        for (key, value) in [
            ("num_hidden_layers", json!(config.layers)),
            ("dtype", json!("float32")),
            ("torch_dtype", json!("float32")),
        ] {
            own[key] = value;
        }
        // It tells the kind of each layer where transformers 5 wrote it.
        if let Some(kinds) = own["layer_types"].as_array_mut() {
            kinds.truncate(config.layers);
        }
        json = Ok(own);
    } else {
        for (name, text) in ChatTokenizer::open(source)?.to_files()? {
            files.insert(name.to_owned(), Bytes::from(text));
        }
        files.insert("generation_config.json".to_owned(), Bytes::from(generation(config).to_string()));
    }
    files.insert("config.json".to_owned(), Bytes::from(format!("{:#}", json?)));
    Ok(files)
}

/// Which tokens end a text.
fn generation(config: &LlamaConfig) -> Json {
    let mut out = json!({ "do_sample": false });
    if let Some(bos) = config.bos {
        out["bos_token_id"] = json!(bos);
    }
    if !config.eos.is_empty() {
        out["eos_token_id"] = json!(config.eos);
    }
    out
}

/// All tensors of some weights under their Hugging Face names: with an adapter, those of the merged model.
///
/// # Errors
/// A tensor can't be read (exit 65).
pub fn all_tensors(weights: &Weights) -> Result<Vec<NamedTensor>> {
    let read = |t: crate::llm::architectures::TensorName| {
        let values = weights.values(&t.hf)?;
        Ok(NamedTensor { name: t.hf, shape: t.shape, values })
    };
    tensors(weights.config()).map(read).collect()
}
