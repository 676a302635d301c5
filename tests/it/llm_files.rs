//! Model files that are damaged, cut off or of the wrong kind: exit 65 and a message that names the place.

use std::collections::HashMap;
use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value as Json, json};
use tailfuse::device::DeviceChoice;
use tailfuse::error::Error;
use tailfuse::llm::gguf::Gguf;
use tailfuse::llm::{ChatTokenizer, Llm, Message};
use tempfile::TempDir;

use crate::llm::{golden, golden_json, ids};

/// A metadata value to write.
#[derive(Clone)]
enum Meta {
    U32(u32),
    F32(f32),
    Text(&'static str),
    Texts(Vec<String>),
    I32s(Vec<i32>),
}

/// A GGUF file in parts, so that a test can spoil one of them.
#[derive(Clone)]
struct File {
    meta: Vec<(&'static str, Meta)>,
    /// Name, sizes (fastest first), type id, bytes.
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl File {
    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.meta.len() as u64).to_le_bytes());
        for (key, value) in &self.meta {
            put_text(&mut out, key);
            match value {
                Meta::U32(n) => {
                    out.extend(4u32.to_le_bytes());
                    out.extend(n.to_le_bytes());
                }
                Meta::F32(x) => {
                    out.extend(6u32.to_le_bytes());
                    out.extend(x.to_le_bytes());
                }
                Meta::Text(t) => {
                    out.extend(8u32.to_le_bytes());
                    put_text(&mut out, t);
                }
                Meta::Texts(list) => {
                    out.extend([9u32.to_le_bytes(), 8u32.to_le_bytes()].concat());
                    out.extend((list.len() as u64).to_le_bytes());
                    list.iter().for_each(|t| put_text(&mut out, t));
                }
                Meta::I32s(list) => {
                    out.extend([9u32.to_le_bytes(), 5u32.to_le_bytes()].concat());
                    out.extend((list.len() as u64).to_le_bytes());
                    list.iter().for_each(|n| out.extend(n.to_le_bytes()));
                }
            }
        }
        let mut offset = 0u64;
        for (name, dims, kind, data) in &self.tensors {
            put_text(&mut out, name);
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += (data.len() as u64).div_ceil(32) * 32;
        }
        for (_, _, _, data) in &self.tensors {
            out.resize(out.len().div_ceil(32) * 32, 0);
            out.extend(data);
        }
        out
    }

    fn set(&mut self, key: &'static str, value: Meta) {
        self.meta.retain(|(k, _)| *k != key);
        self.meta.push((key, value));
    }

    fn tensor(&mut self, name: &str) -> &mut (String, Vec<u64>, u32, Vec<u8>) {
        self.tensors.iter_mut().find(|t| t.0 == name).unwrap()
    }
}

/// The weights of `tests/golden/llm/tiny`.
fn tiny_tensors() -> HashMap<String, (Vec<u64>, Vec<u8>)> {
    let bytes = std::fs::read(golden("tiny/model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.tensors()
        .into_iter()
        .map(|(name, t)| (name, (t.shape().iter().map(|d| *d as u64).collect(), t.data().to_vec())))
        .collect()
}

/// Hugging Face row order to GGUF's: within a head, row `j d/2 + i` becomes `2 i + j`.
fn permute(bytes: &[u8], head_dim: usize, columns: usize) -> Vec<u8> {
    let mut out = vec![0; bytes.len()];
    let width = 4 * columns;
    for (r, row) in bytes.chunks(width).enumerate() {
        let (head, within) = (r / head_dim, r % head_dim);
        let to = head * head_dim + 2 * (within % (head_dim / 2)) + within / (head_dim / 2);
        out[to * width..(to + 1) * width].copy_from_slice(row);
    }
    out
}

/// `tests/golden/llm/tiny` as a GGUF file with a vocabulary of its own.
fn tiny_gguf() -> File {
    let leaves = [
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ];
    let mut names = vec![
        ("token_embd.weight".to_owned(), "model.embed_tokens.weight".to_owned()),
        ("output_norm.weight".to_owned(), "model.norm.weight".to_owned()),
    ];
    for layer in 0..2 {
        for (ours, theirs) in leaves {
            names.push((format!("blk.{layer}.{ours}.weight"), format!("model.layers.{layer}.{theirs}.weight")));
        }
    }
    let weights = tiny_tensors();
    let tensors = names
        .into_iter()
        .map(|(ours, theirs)| {
            let (shape, data) = weights[&theirs].clone();
            let permuted = ours.contains("attn_q.") || ours.contains("attn_k.");
            let data = if permuted { permute(&data, 8, 32) } else { data };
            (ours, shape.into_iter().rev().collect(), 0, data)
        })
        .collect();
    let mut tokens: Vec<String> = vec!["<|end|>".into(), "<|start|>".into()];
    tokens.extend("<|>_Ġ0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTU".chars().map(String::from));
    let mut types = vec![1; 64];
    types[..2].fill(3);
    let meta = vec![
        ("general.architecture", Meta::Text("llama")),
        ("llama.block_count", Meta::U32(2)),
        ("llama.context_length", Meta::U32(128)),
        ("llama.embedding_length", Meta::U32(32)),
        ("llama.feed_forward_length", Meta::U32(64)),
        ("llama.attention.head_count", Meta::U32(4)),
        ("llama.attention.head_count_kv", Meta::U32(2)),
        ("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
        ("llama.rope.freq_base", Meta::F32(10_000.0)),
        ("tokenizer.ggml.model", Meta::Text("gpt2")),
        ("tokenizer.ggml.pre", Meta::Text("smollm")),
        ("tokenizer.ggml.tokens", Meta::Texts(tokens)),
        ("tokenizer.ggml.token_type", Meta::I32s(types)),
        ("tokenizer.ggml.merges", Meta::Texts(vec![])),
        ("tokenizer.ggml.eos_token_id", Meta::U32(0)),
        (
            "tokenizer.chat_template",
            Meta::Text("{% for m in messages %}\n<|start|>{{ m.content.strip() }}<|end|>{% endfor %}"),
        ),
    ];
    File { meta, tensors }
}

/// What opening a file of these bytes gives.
fn open(bytes: &[u8]) -> Result<Llm, Error> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("tiny.gguf");
    std::fs::write(&path, bytes).unwrap();
    Llm::open(&path, DeviceChoice::Cpu)
}

/// Opening must fail with exit 65 and these words, the file's name among them.
fn refused(bytes: &[u8], words: &[&str]) {
    let error = open(bytes).err().unwrap_or_else(|| panic!("opened, but {words:?} was expected"));
    let message = error.to_string();
    assert_eq!(error.fault.exit_code(), 65, "{message}");
    for word in words.iter().chain(&["tiny.gguf"]) {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}

#[test]
fn a_gguf_file_gives_the_logits_of_the_folder() {
    let llm = open(&tiny_gguf().bytes()).unwrap();
    let want = golden_json("tiny/golden.json");
    let sequence = ids(&want["sequences"][1]["ids"]);
    let rows = want["logits"][1].as_array().unwrap();
    for (got, want) in llm.logits(&sequence).unwrap().iter().zip(rows.last().unwrap().as_array().unwrap()) {
        assert!((f64::from(*got) - want.as_f64().unwrap()).abs() < 1e-4);
    }
    assert_eq!(llm.config().eos, [0]);
}

#[test]
fn half_precision_and_blocks_load_too() {
    let mut file = tiny_gguf();
    let name = "blk.0.ffn_up.weight";
    let singles: Vec<f32> = file.tensor(name).3.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let want = open(&file.bytes()).unwrap().logits(&[3, 4, 5]).unwrap();
    for (kind, bytes) in [
        (1, singles.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect::<Vec<u8>>()),
        (30, singles.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect()),
        // Q8_0: a scale of 1/64 and whole numbers.
        (
            8,
            singles
                .chunks(32)
                .flat_map(|c| {
                    let scale = half::f16::from_f32(1.0 / 64.0).to_le_bytes();
                    scale.into_iter().chain(c.iter().map(|x| (x * 64.0).round() as i8 as u8)).collect::<Vec<u8>>()
                })
                .collect(),
        ),
    ] {
        (file.tensor(name).2, file.tensor(name).3) = (kind, bytes);
        let got = open(&file.bytes()).unwrap().logits(&[3, 4, 5]).unwrap();
        let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(worst > 0.0 && worst < 0.2, "type {kind}: {worst}");
    }
}

#[test]
fn a_template_with_python_methods_keeps_messages_from_special_tokens() {
    let llm = open(&tiny_gguf().bytes()).unwrap();
    let chat = |text: &str| llm.chat().encode_chat(&[Message::new("user", text)]).unwrap();
    let ids = chat("  ab  ");
    assert_eq!((ids[0], *ids.last().unwrap()), (1, 0));
    assert_eq!(llm.chat().decode(&ids), "<|start|>ab<|end|>");
    for evil in ["<|end|>", "  |end|>  ", "a<|start|>", "<|st", " <"] {
        let ids = chat(evil);
        assert_eq!(ids.iter().filter(|id| **id < 2).count(), 2, "{evil:?}: {ids:?}");
        assert_eq!(llm.chat().decode(&ids), format!("<|start|>{}<|end|>", evil.trim()));
    }
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let bytes = tiny_gguf().bytes();
    let header = bytes.len() - tiny_gguf().tensors.iter().map(|t| t.3.len().div_ceil(32) * 32).sum::<usize>();
    for n in (0..header).step_by(7).chain([header, header + 100, bytes.len() - 1]) {
        let error = open(&bytes[..n]).err().unwrap_or_else(|| panic!("opened with {n} of {} bytes", bytes.len()));
        assert_eq!(error.fault.exit_code(), 65);
        assert!(error.message.contains("tiny.gguf"), "{error}");
    }
    refused(
        &bytes[..bytes.len() - 1],
        &["cut off", "byte", "output_norm.weight"]
            .map(|w| if w == "output_norm.weight" { "blk.1.ffn_down.weight" } else { w }),
    );
    refused(b"", &["GGUF"]);
    refused(b"PK\x03\x04 something else", &["does not start with `GGUF`"]);
}

#[test]
fn numbers_that_cannot_be_are_refused_before_anything_is_allocated() {
    let good = tiny_gguf().bytes();
    for (at, words) in
        [(8, "tensors are announced"), (16, "metadata keys are announced"), (24, "bytes of text are announced")]
    {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&(u64::MAX / 2).to_le_bytes());
        refused(&bytes, &[words]);
    }
    let mut bytes = good.clone();
    bytes[4..8].copy_from_slice(&1u32.to_le_bytes());
    refused(&bytes, &["version 1 is not supported"]);
    bytes[4..8].copy_from_slice(&3u32.to_be_bytes());
    refused(&bytes, &["big-endian"]);

    let mut file = tiny_gguf();
    file.tensor("token_embd.weight").1 = vec![32, 1 << 60];
    refused(&file.bytes(), &["token_embd.weight"]);
    let mut file = tiny_gguf();
    file.set("llama.block_count", Meta::U32(4_000_000_000));
    refused(&file.bytes(), &["number of layers"]);
    let mut file = tiny_gguf();
    file.set("llama.block_count", Meta::U32(4000));
    refused(&file.bytes(), &["model.layers.2."]);
}

#[test]
fn unknown_and_unsupported_types_are_named() {
    let mut file = tiny_gguf();
    file.tensor("blk.1.attn_v.weight").2 = 99;
    refused(&file.bytes(), &["unknown quantization type 99", "blk.1.attn_v.weight", "Q4_1"]);
    file.tensor("blk.1.attn_v.weight").2 = 16;
    refused(&file.bytes(), &["IQ2_XXS", "blk.1.attn_v.weight"]);
}

#[test]
fn values_that_are_not_finite_are_refused() {
    let mut file = tiny_gguf();
    file.tensor("blk.0.ffn_up.weight").3[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
    refused(&file.bytes(), &["value 1 of the tensor `blk.0.ffn_up.weight`", "NaN"]);
}

#[test]
fn a_vocabulary_that_does_not_fit_the_weights_is_refused() {
    let mut file = tiny_gguf();
    let tokens: Vec<String> = (0..65).map(|i| format!("t{i}")).collect();
    file.set("tokenizer.ggml.tokens", Meta::Texts(tokens));
    file.set("tokenizer.ggml.token_type", Meta::I32s(vec![1; 65]));
    refused(&file.bytes(), &["65 tokens", "64"]);

    let mut file = tiny_gguf();
    file.set("tokenizer.ggml.token_type", Meta::I32s(vec![1; 3]));
    refused(&file.bytes(), &["64 tokens have 3 token types"]);
    let mut file = tiny_gguf();
    file.set("tokenizer.ggml.tokens", Meta::Texts(vec!["a".into(); 64]));
    file.set("tokenizer.ggml.token_type", Meta::I32s(vec![1; 64]));
    refused(&file.bytes(), &["are the same"]);
}

#[test]
fn models_of_another_kind_are_refused_by_name() {
    for (key, value, words) in [
        ("general.architecture", Meta::Text("gpt2"), "architecture `gpt2`"),
        ("tokenizer.ggml.model", Meta::Text("t5"), "tokenizer `t5`"),
        ("tokenizer.ggml.model", Meta::Text("llama"), "`tokenizer.ggml.scores` is missing"),
        ("tokenizer.ggml.pre", Meta::Text("viking"), "pre-tokenizer `viking`"),
        ("llama.vocab_size", Meta::U32(60), "60, but `token_embd.weight` has 64 rows"),
        ("llama.rope.scaling.type", Meta::Text("yarn"), "yarn"),
        ("llama.rope.scaling.type", Meta::Text("linear"), "`llama.rope.scaling.factor` is missing"),
        ("llama.attention.sliding_window", Meta::U32(64), "llama.attention.sliding_window"),
        ("llama.expert_count", Meta::U32(8), "llama.expert_count"),
        ("llama.rope.dimension_count", Meta::U32(4), "llama.rope.dimension_count"),
        ("llama.attention.head_count_kv", Meta::U32(3), "cannot share"),
        ("llama.embedding_length", Meta::U32(64), "model.embed_tokens.weight"),
        ("llama.feed_forward_length", Meta::Text("many"), "llama.feed_forward_length"),
        ("tokenizer.chat_template", Meta::Text("{% for %}"), "chat template"),
    ] {
        let mut file = tiny_gguf();
        file.set(key, value);
        refused(&file.bytes(), &[words]);
    }
    let mut file = tiny_gguf();
    file.meta.retain(|(k, _)| *k != "llama.context_length");
    refused(&file.bytes(), &["`llama.context_length` is missing"]);
    let mut file = tiny_gguf();
    file.tensors.retain(|t| t.0 != "blk.1.ffn_gate.weight");
    refused(&file.bytes(), &["model.layers.1.mlp.gate_proj.weight", "missing"]);
    let mut file = tiny_gguf();
    file.tensors.push(("blk.0.attn_q.bias".into(), vec![32], 0, vec![0; 128]));
    refused(&file.bytes(), &["blk.0.attn_q.bias"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    /// No damage to the header makes the reader panic or allocate without bound.
    #[test]
    fn damaged_headers_are_read_or_refused(damage in prop::collection::vec((0usize..4000, any::<u8>()), 1..4)) {
        let mut bytes = tiny_gguf().bytes();
        for (at, byte) in damage {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        if let Err(e) = open(&bytes) {
            prop_assert_eq!(e.fault.exit_code(), 65, "{}", e);
        }
    }
}

/// A copy of the tiny folder, for damage.
fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden("tiny").join(name), folder.path().join(name)).unwrap();
    }
    folder
}

fn folder_refused(path: &Path, words: &[&str]) {
    let error =
        Llm::open(path, DeviceChoice::Cpu).err().unwrap_or_else(|| panic!("opened, but {words:?} was expected"));
    let message = error.to_string();
    assert_eq!(error.fault.exit_code(), 65, "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}

fn edit_config(folder: &Path, edit: impl FnOnce(&mut Json)) {
    let path = folder.join("config.json");
    let mut config: Json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    std::fs::write(&path, config.to_string()).unwrap();
}

#[test]
fn damaged_folders_are_refused() {
    let bytes = std::fs::read(golden("tiny/model.safetensors")).unwrap();
    for n in [0, 4, 100, bytes.len() / 2, bytes.len() - 1] {
        let folder = folder();
        std::fs::write(folder.path().join("model.safetensors"), &bytes[..n]).unwrap();
        folder_refused(folder.path(), &["model.safetensors"]);
    }
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let spoiled = folder();
    std::fs::write(spoiled.path().join("model.safetensors"), huge).unwrap();
    folder_refused(spoiled.path(), &["model.safetensors"]);
    let spoiled = folder();
    std::fs::remove_file(spoiled.path().join("model.safetensors")).unwrap();
    folder_refused(spoiled.path(), &["model.safetensors"]);
    folder_refused(&spoiled.path().join("nowhere"), &["nowhere"]);
    for (key, value, words) in [
        ("vocab_size", json!(65), "model.embed_tokens.weight"),
        ("model_type", json!("gpt2"), "`gpt2`"),
        ("hidden_act", json!("gelu"), "`gelu`"),
        ("attention_bias", json!(true), "attention_bias"),
        ("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0}), "llama3"),
        ("hidden_size", json!("wide"), "not a model configuration"),
        ("num_attention_heads", json!(0), "number of heads"),
        ("tie_word_embeddings", json!(false), "lm_head.weight"),
        ("head_dim", json!(7), "odd"),
    ] {
        let spoiled = folder();
        edit_config(spoiled.path(), |c| c[key] = value);
        folder_refused(spoiled.path(), &[words]);
    }
}

#[test]
fn rope_theta_is_read_from_both_places() {
    let sequence = [5, 9, 33, 2, 60, 11];
    let logits = |theta: Option<f64>, nested: Option<f64>| {
        let folder = folder();
        edit_config(folder.path(), |c| {
            c.as_object_mut().unwrap().remove("rope_theta");
            if let Some(theta) = theta {
                c["rope_theta"] = json!(theta);
            }
            if let Some(theta) = nested {
                c["rope_parameters"] = json!({"rope_type": "default", "rope_theta": theta});
            }
        });
        Llm::open(folder.path(), DeviceChoice::Cpu).unwrap().logits(&sequence).unwrap()
    };
    assert_eq!(logits(Some(500.0), None), logits(None, Some(500.0)));
    assert_eq!(logits(None, None), logits(Some(10_000.0), None));
    assert_ne!(logits(Some(500.0), None), logits(Some(10_000.0), None));
}

#[test]
fn shards_and_half_precision_give_the_same_model() {
    let want = Llm::open(&golden("tiny"), DeviceChoice::Cpu).unwrap().logits(&[1, 2, 3]).unwrap();
    let weights = tiny_tensors();
    let mut names: Vec<&String> = weights.keys().collect();
    names.sort();
    let folder = folder();
    std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    let mut index = serde_json::Map::new();
    for (shard, part) in names.chunks(names.len().div_ceil(2)).enumerate() {
        let file = format!("model-{shard}.safetensors");
        let half: Vec<(String, Vec<usize>, Vec<u8>)> = part
            .iter()
            .map(|n| {
                let (shape, bytes) = &weights[*n];
                let singles = bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                let bytes = if shard == 0 {
                    singles.flat_map(|x| half::f16::from_f32(x).to_le_bytes()).collect()
                } else {
                    singles.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect()
                };
                ((*n).clone(), shape.iter().map(|d| *d as usize).collect(), bytes)
            })
            .collect();
        let dtype = if shard == 0 { safetensors::Dtype::F16 } else { safetensors::Dtype::BF16 };
        let views =
            half.iter().map(|(n, s, b)| (n, safetensors::tensor::TensorView::new(dtype, s.clone(), b).unwrap()));
        safetensors::serialize_to_file(views, None, &folder.path().join(&file)).unwrap();
        index.extend(part.iter().map(|n| ((*n).clone(), json!(file))));
    }
    let index_path = folder.path().join("model.safetensors.index.json");
    std::fs::write(&index_path, json!({"metadata": {}, "weight_map": index}).to_string()).unwrap();
    let got = Llm::open(folder.path(), DeviceChoice::Cpu).unwrap().logits(&[1, 2, 3]).unwrap();
    let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(worst > 0.0 && worst < 0.1, "{worst}");

    index.insert("model.norm.weight".into(), json!("../elsewhere.safetensors"));
    std::fs::write(&index_path, json!({"weight_map": index}).to_string()).unwrap();
    folder_refused(folder.path(), &["not a plain file name"]);
    index.insert("model.norm.weight".into(), json!("model-7.safetensors"));
    std::fs::write(&index_path, json!({"weight_map": index}).to_string()).unwrap();
    folder_refused(folder.path(), &["the shard `model-7.safetensors` with 1 tensors is missing"]);
    // A tensor whose place in the index is the other shard.
    index.insert("model.norm.weight".into(), json!("model-0.safetensors"));
    std::fs::write(&index_path, json!({"weight_map": index}).to_string()).unwrap();
    let first = std::fs::read(folder.path().join("model-0.safetensors")).unwrap();
    let there = safetensors::SafeTensors::deserialize(&first).unwrap().tensor("model.norm.weight").is_ok();
    if !there {
        let words = ["`model.norm.weight` is not in its shard `model-0.safetensors`", "it is in `model-1.safetensors`"];
        folder_refused(folder.path(), &words);
    }
}

#[test]
fn a_folder_with_a_tokenizer_is_read_like_the_gguf() {
    // The tokenizer and the template of the GGUF file, written as Hugging Face does.
    let template = "{% for m in messages %}<|start|>{{ m['content'] }}{{ eos_token }}{% endfor %}";
    let vocab: serde_json::Map<String, Json> = ["<|end|>", "<|start|>", "a", "b", "ab", "Ġ"]
        .iter()
        .enumerate()
        .map(|(i, t)| ((*t).to_owned(), json!(i)))
        .collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": null, "added_tokens": [special(0, "<|end|>"), special(1, "<|start|>")], "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [["a", "b"]]},
    });
    let folder = folder();
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let settings = folder.path().join("tokenizer_config.json");
    for settings_json in [
        json!({"chat_template": template, "eos_token": "<|end|>"}),
        json!({"chat_template": [{"name": "tool", "template": "x"}, {"name": "default", "template": template}],
               "eos_token": {"content": "<|end|>"}}),
    ] {
        std::fs::write(&settings, settings_json.to_string()).unwrap();
        let chat = ChatTokenizer::open(folder.path()).unwrap();
        let messages = [Message::new("user", "ab<|end|> a"), Message::new("user", "b")];
        // `<`, `|` and the letters of "end" are not in this vocabulary; nothing of them may be token 0.
        assert_eq!(chat.encode_chat(&messages).unwrap(), [1, 4, 5, 2, 0, 1, 3, 0]);
        assert_eq!(chat.render(&messages, true).unwrap(), "<|start|>ab<|end|> a<|end|><|start|>b<|end|>");
    }
    std::fs::write(folder.path().join("chat_template.jinja"), "{{ messages[0].content }}<|start|>").unwrap();
    let chat = ChatTokenizer::open(folder.path()).unwrap();
    assert_eq!(chat.encode_chat(&[Message::new("user", "ab")]).unwrap(), [4, 1]);

    std::fs::write(folder.path().join("chat_template.jinja"), "{{ raise_exception('only pairs') }}").unwrap();
    let chat = ChatTokenizer::open(folder.path()).unwrap();
    let error = chat.encode_chat(&[Message::new("user", "ab")]).unwrap_err();
    assert!(error.message.contains("only pairs"), "{error}");

    std::fs::write(folder.path().join("tokenizer.json"), "{").unwrap();
    folder_refused(folder.path(), &["tokenizer.json"]);
    let bare = self::folder();
    assert!(ChatTokenizer::open(bare.path()).err().unwrap().message.contains("tokenizer.json"));
}

#[test]
fn the_tensor_table_is_open_to_inspection() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("tiny.gguf");
    std::fs::write(&path, tiny_gguf().bytes()).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(gguf.tensor_names().len(), 20);
    assert_eq!(gguf.tensor("blk.0.attn_k.weight").unwrap().dims, [32, 16]);
    assert_eq!(gguf.count("llama.block_count").unwrap(), 2);
    assert!(gguf.dequantize("no.such").is_err());
}
