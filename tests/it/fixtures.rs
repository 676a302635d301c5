//! A small world for tests: an interaction log in foreign column names, an item table, a tiny
//! LLM with a byte-level tokenizer, and a pipeline file over them. Everything is made from seeds.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A folder with data, model and pipeline; gone when dropped.
pub struct World {
    pub folder: tempfile::TempDir,
    /// More of the environment.
    pub variables: Vec<(String, String)>,
}

/// One line of the log: user, item, rating, time.
pub type Line = (Option<String>, Option<String>, f64, i64);

pub const USERS: usize = 24;
pub const ITEMS: usize = 40;

/// A log in which users of one half like items of one half, with histories of 5 to 20.
pub fn log() -> Vec<Line> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut lines = Vec::new();
    for u in 0..USERS {
        let n = 5 + u * 15 / USERS;
        let mut items: Vec<usize> = (0..ITEMS / 2).map(|i| i * 2 + u % 2).collect();
        for place in 0..n.min(items.len() - 1) {
            let other = rng.random_range(place..items.len());
            items.swap(place, other);
            let item = format!("m{:02}", items[place]);
            lines.push((
                Some(format!("u{u:02}")),
                Some(item),
                rng.random_range(1..=5) as f64,
                1_000 + place as i64 * 10,
            ));
        }
    }
    lines
}

/// Titles: item 7 has none.
pub fn titles() -> Vec<(String, Option<String>)> {
    (0..ITEMS).map(|i| (format!("m{i:02}"), (i != 7).then(|| format!("The Film No. {i} ({})", 1950 + i)))).collect()
}

pub fn write_parquet(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

impl World {
    /// A folder with nothing in it.
    pub fn empty() -> World {
        World { folder: tempfile::tempdir().unwrap(), variables: Vec::new() }
    }

    /// The default world: `log()`, `titles()`, the tiny LLM, `pipeline.toml`.
    pub fn new() -> World {
        let world = World::empty();
        world.write_log(&log());
        let titles = titles();
        write_parquet(
            &world.path("data/films.parquet"),
            vec![
                ("movie", Arc::new(StringArray::from_iter_values(titles.iter().map(|t| &t.0))) as ArrayRef),
                ("name", Arc::new(StringArray::from_iter(titles.iter().map(|t| t.1.clone())))),
            ],
        );
        write_tiny_llm(&world.path("llm"));
        world.write("pipeline.toml", PIPELINE);
        world
    }

    pub fn path(&self, relative: &str) -> PathBuf {
        self.folder.path().join(relative)
    }

    pub fn write(&self, relative: &str, text: &str) {
        let path = self.path(relative);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    pub fn write_log(&self, lines: &[Line]) {
        write_parquet(
            &self.path("data/events.parquet"),
            vec![
                ("uid", Arc::new(StringArray::from_iter(lines.iter().map(|l| l.0.clone()))) as ArrayRef),
                ("movie", Arc::new(StringArray::from_iter(lines.iter().map(|l| l.1.clone())))),
                ("stars", Arc::new(Float64Array::from_iter_values(lines.iter().map(|l| l.2)))),
                ("ts", Arc::new(Int64Array::from_iter_values(lines.iter().map(|l| l.3)))),
            ],
        );
    }

    /// The binary in the world's folder, not started yet.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tailfuse"));
        command
            .args(args)
            .current_dir(self.folder.path())
            .env("TAILFUSE_CACHE", self.path("cache"))
            .env_remove("RUST_LOG")
            .env_remove("TAILFUSE_PIPELINE")
            .envs(self.variables.iter().map(|(k, v)| (k, v)));
        command
    }

    /// Runs the binary in the world's folder.
    pub fn tailfuse(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs and expects an exit code; gives stdout and stderr.
    pub fn expect(&self, code: i32, args: &[&str]) -> (String, String) {
        let output = self.tailfuse(args);
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "tailfuse {args:?}\nstdout:\n{out}\nstderr:\n{err}");
        (out, err)
    }

    /// Runs a pipeline that must end well; gives the result document.
    pub fn run(&self, args: &[&str]) -> serde_json::Value {
        let (out, _) = self.expect(0, &[&["run"], args].concat());
        serde_json::from_str(out.lines().last().unwrap()).unwrap()
    }

    /// Rows of an SQL question, as JSON.
    pub fn sql(&self, query: &str) -> Vec<serde_json::Value> {
        let (out, _) = self.expect(0, &["sql", "-p", "pipeline.toml", "--format", "json", query]);
        serde_json::from_str(&out).unwrap()
    }
}

/// A stage of a result document.
pub fn stage<'a>(document: &'a serde_json::Value, name: &str) -> &'a serde_json::Value {
    document["stages"].as_array().unwrap().iter().find(|s| s["name"] == name).unwrap()
}

/// A Llama of 2 layers with random weights and one token per byte.
pub fn write_tiny_llm(folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    let (vocab, hidden, heads, kv_heads, inter, layers) = (260usize, 32usize, 4usize, 2usize, 64usize, 2usize);
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": inter, "vocab_size": vocab, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 4096, "tie_word_embeddings": true, "bos_token_id": 256, "eos_token_id": 258,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();

    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let kv = hidden / heads * kv_heads;
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
    for layer in 0..layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        shapes.extend([
            (name("input_layernorm"), vec![hidden]),
            (name("self_attn.q_proj"), vec![hidden, hidden]),
            (name("self_attn.k_proj"), vec![kv, hidden]),
            (name("self_attn.v_proj"), vec![kv, hidden]),
            (name("self_attn.o_proj"), vec![hidden, hidden]),
            (name("post_attention_layernorm"), vec![hidden]),
            (name("mlp.gate_proj"), vec![inter, hidden]),
            (name("mlp.up_proj"), vec![inter, hidden]),
            (name("mlp.down_proj"), vec![hidden, inter]),
        ]);
    }
    shapes.push(("model.norm.weight".to_owned(), vec![hidden]));
    let tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let n: usize = shape.iter().product();
            let values = (0..n).map(|_| if shape.len() == 1 { 1.0 } else { rng.random_range(-0.2f32..0.2) });
            let bytes = values.flat_map(f32::to_le_bytes).collect();
            (name, (shape, bytes))
        })
        .collect();
    let views: Vec<(String, safetensors::tensor::TensorView<'_>)> = tensors
        .iter()
        .map(|(name, (shape, bytes))| {
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap();
            (name.clone(), view)
        })
        .collect();
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.join("model.safetensors"), bytes).unwrap();

    // GPT-2's byte alphabet: printable bytes stand for themselves, the rest for code points from 256 up.
    let mut next = 256u32;
    let mut vocab_map = serde_json::Map::new();
    for byte in 0..=255u32 {
        let printable = (33..=126).contains(&byte) || (161..=172).contains(&byte) || (174..=255).contains(&byte);
        let c = if printable {
            byte
        } else {
            next += 1;
            next - 1
        };
        vocab_map.insert(char::from_u32(c).unwrap().to_string(), byte.into());
    }
    let specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"];
    let added: Vec<_> = specials
        .iter()
        .enumerate()
        .map(|(i, s)| {
            serde_json::json!({"id": 256 + i, "content": s, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let byte_level =
        serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab_map, "merges": []},
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let template = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
                    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let tokenizer_config =
        serde_json::json!({"chat_template": template, "eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"});
    std::fs::write(folder.join("tokenizer_config.json"), tokenizer_config.to_string()).unwrap();
}

/// The head of a pipeline over the small world: sources in its column names, and the split. `concat!(head!(), ...)`.
macro_rules! head {
    () => {
        r#"name = "small"
seed = 7

[params]
ds = "2026-11-22"

[sources.events]
uri = "data/events.parquet"
columns = { user_id = "uid", item_id = "movie", rating = "stars", timestamp = "ts" }

[sources.films]
uri = "data/films.parquet"
columns = { item_id = "movie", title = "name" }

[stages.parts]
kind = "split"
input = "events"
"#
    };
}

/// The demo's shape over the small world.
pub const PIPELINE: &str = concat!(
    head!(),
    r#"
[stages.model]
kind = "train"
model = "lightgcn"
train = "parts.train"
valid = "parts.valid"
[stages.model.hyper]
embedding_dim = 8
epochs = 5

[stages.tail_valid]
kind = "sql"
file = "builtin:long_tail"
inputs = { history = "parts.train" }

[stages.tail]
kind = "sql"
file = "builtin:long_tail"
inputs = { history = "parts.history" }

[stages.shortlist_valid]
kind = "recommend"
model = "model.model"
history = "parts.train"
k = 8

[stages.shortlist]
kind = "recommend"
model = "model.model"
history = "parts.history"
k = 8

[stages.neighbours]
kind = "similar"
embeddings = "model.user_embeddings"
n = 1

[stages.prompts_valid]
kind = "prompt"
model = "llm"
shortlist = "shortlist_valid"
history = "parts.train"
items = "films"
neighbours = "neighbours"
users = "parts.valid"

[stages.rerank_valid]
kind = "rerank"
model = "llm"
prompts = "prompts_valid"
long_tail = "tail_valid"
order = "random"
budget = { users = 6 }

[stages.calibration]
kind = "calibrate"
shortlist = "shortlist_valid"
rerank = "rerank_valid"
valid = "parts.valid"
long_tail = "tail_valid"

[stages.prompts]
kind = "prompt"
model = "llm"
shortlist = "shortlist"
history = "parts.history"
items = "films"
neighbours = "neighbours"

[stages.rerank]
kind = "rerank"
model = "llm"
prompts = "prompts"
skipped = "prompts.skipped"
long_tail = "tail"
budget = { users = 10 }

[stages.fused]
kind = "fuse"
shortlist = "shortlist"
rerank = "rerank.reranked"
not_asked = "rerank.not_asked"
long_tail = "tail"
items = "films"
calibration = "calibration"
model = "model.model"
llm = "llm"
k = 5

[stages.quality]
kind = "evaluate"
shortlist = "fused.shortlist"
test = "parts.test"

[stages.publish]
kind = "write"
input = "fused"
table = "recommendations"
partition = { ds = "{{ ds }}" }
"#
);
