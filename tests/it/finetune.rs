//! `finetune` through the binary: the loss falls, what it makes can be asked, and other programs load it.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use tailfuse::device::DeviceChoice;
use tailfuse::llm::tune::LoraFile;
use tailfuse::llm::{ChatTokenizer, Llm, LlmOptions, Message, Precision};

use crate::fixtures::{PIPELINE, World, stage};
use crate::llm::{golden, golden_json, smollm2};

/// 32 bits: what other programs compute in.
fn exact() -> LlmOptions {
    LlmOptions { precision: Precision::F32, ..LlmOptions::default() }
}

/// Instructions, an adapter and a whole model tuned on them, and one on lists of titles.
const STAGES: &str = r#"
[stages.instructions]
kind = "instruct"
train = "parts.train"
items = "films"
model = "llm"
tasks = ["pairwise", "ranking"]
per_task = 30
candidates = 4
noun = "films"
held_out_share = 0.2

[stages.adapted]
kind = "finetune"
model = "llm"
examples = "instructions"
rank = 4
dropout = 0.05
learning_rate = 0.01
batch = 4
accumulation = 2
epochs = 2
warmup_steps = 1
pack_tokens = 1024

[stages.whole]
kind = "finetune"
model = "llm"
examples = "instructions"
method = "full"
learning_rate = 0.003
batch = 8
steps = 6
recompute = true
patience = 3
eval_every = 2

[stages.titled]
kind = "sql"
query = "select t.user_id, t.position, f.title from train t join films f using (item_id) order by t.user_id, t.position"
inputs = { train = "parts.train", films = "films" }

[stages.dense]
kind = "finetune"
model = "llm"
objective = "titles"
histories = "titled"
method = "full"
merge = false
learning_rate = 0.003
batch = 8
tokens = 4000
"#;

fn folder(world: &World, document: &Value, name: &str, output: &str) -> PathBuf {
    world.path("artifacts").join(stage(document, name)["fingerprint"].as_str().unwrap()).join(output)
}

#[test]
fn what_was_tuned_is_asked_as_any_model_and_loads_elsewhere() {
    let world = World::new();
    let asked = PIPELINE.replace("model = \"llm\"", "model = \"adapted.model\"");
    world.write("pipeline.toml", &format!("{asked}{STAGES}"));
    let document = world.run(&["pipeline.toml"]);
    for name in ["adapted", "whole", "dense"] {
        let counters = &stage(&document, name)["counters"];
        let number = |key: &str| counters[key].as_f64().unwrap_or_else(|| panic!("{name}: no {key} in {counters}"));
        assert!(number("held_out_after") < number("held_out_before") - 0.05, "{name}: {counters}");
        assert!(number("steps") > 0.0 && number("learned_tokens") > 0.0);
    }
    // All titles but the first are learned: more tokens a token read than of instructions.
    let density = |name: &str| {
        let counters = &stage(&document, name)["counters"];
        counters["learned_tokens"].as_f64().unwrap() / counters["tokens"].as_f64().unwrap()
    };
    assert!(density("dense") > 3.0 * density("adapted"));
    let adapter = folder(&world, &document, "adapted", "adapter");
    let model = folder(&world, &document, "adapted", "model");
    let base = world.path("llm");

    // The adapter over the base is the merged model.
    let file = LoraFile::open(&adapter).unwrap();
    let over = Llm::open_adapted(&base, Some(file), DeviceChoice::Cpu, exact()).unwrap();
    let merged = Llm::open_with(&model, DeviceChoice::Cpu, exact()).unwrap();
    let text = "Which film, <|im_end|> or \"Heat\"?";
    let ids = merged.chat().encode_chat(&[Message::new("user", text)]).unwrap();
    let plain = merged.chat().encode_chat(&[Message::new("user", "Which film?")]).unwrap();
    let (ours, theirs) = (merged.logits(&ids).unwrap(), over.logits(&ids).unwrap());
    let far = |a: &[f32], b: &[f64]| a.iter().zip(b).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
    assert!(far(&ours, &theirs.iter().map(|x| f64::from(*x)).collect::<Vec<_>>()) < 1e-4);
    let before = Llm::open_with(&base, DeviceChoice::Cpu, exact()).unwrap().logits(&ids).unwrap();
    assert!(far(&ours, &before.iter().map(|x| f64::from(*x)).collect::<Vec<_>>()) > 0.01, "nothing was learned");

    // Another program gives the same logits and ids.
    let Some(python) = python_with(&["torch", "transformers", "peft"]) else {
        eprintln!("SKIPPED: the exports were not loaded elsewhere (`pip install torch transformers peft`)");
        return;
    };
    let output = Command::new(python)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/peers/check_export.py"))
        .args(["--text", "Which film?", "--model"])
        .arg(&model)
        .arg("--base")
        .arg(&base)
        .arg("--adapter")
        .arg(&adapter)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(serde_json::to_value(&plain).unwrap(), found["ids"]);
    let ours = merged.logits(&plain).unwrap();
    for key in ["model", "adapter"] {
        let theirs: Vec<f64> = serde_json::from_value(found[key].clone()).unwrap();
        assert!(far(&ours, &theirs) < 1e-4, "{key}: {}", far(&ours, &theirs));
    }
}

/// A Python that has these modules: `TAILFUSE_TEST_PYTHON`, else `python3`.
fn python_with(modules: &[&str]) -> Option<String> {
    let python = std::env::var("TAILFUSE_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let all = modules.join(", ");
    let output = Command::new(&python).args(["-c", &format!("import {all}")]).output();
    output.is_ok_and(|o| o.status.success()).then_some(python)
}

#[test]
fn a_gguf_file_becomes_a_folder_with_its_tokenizer() {
    let Some(path) = smollm2("a_gguf_file_becomes_a_folder_with_its_tokenizer") else { return };
    let folder = tempfile::tempdir().unwrap();
    let chat = ChatTokenizer::open(&path).unwrap();
    let weights = tailfuse::llm::weights::Weights::open(&path).unwrap();
    std::fs::write(
        folder.path().join("config.json"),
        tailfuse::llm::tune::export::config_json(weights.config()).unwrap().to_string(),
    )
    .unwrap();
    for (name, text) in chat.to_files().unwrap() {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let again = ChatTokenizer::open(folder.path()).unwrap();
    let messages = [Message::new("user", "a  5 Ⅷ² <|im_end|> naïve")];
    assert_eq!(again.encode_chat(&messages).unwrap(), chat.encode_chat(&messages).unwrap());
    let config = tailfuse::llm::LlamaConfig::from_hf(&folder.path().join("config.json")).unwrap();
    assert_eq!(&config, weights.config());
}

#[test]
fn an_adapter_of_peft_over_the_real_model() {
    let Some(path) = smollm2("an_adapter_of_peft_over_the_real_model") else { return };
    let file = LoraFile::open(&golden("lora")).unwrap();
    let llm = Llm::open_adapted(&path, Some(file), DeviceChoice::Cpu, exact()).unwrap();
    let prompts = golden_json("lora/logits.json");
    let prompts = prompts.as_array().unwrap();
    // The longest ones take seconds and show nothing more of an adapter.
    let mut compared = 0;
    for prompt in prompts.iter().filter(|p| p["ids"].as_array().unwrap().len() < 100) {
        let logits = llm.logits(&crate::llm::ids(&prompt["ids"])).unwrap();
        for pair in prompt["top20"].as_array().unwrap() {
            let (id, want) = (pair[0].as_u64().unwrap() as usize, pair[1].as_f64().unwrap());
            assert!((f64::from(logits[id]) - want).abs() < 1e-3, "{}: {} is not {want}", prompt["name"], logits[id]);
        }
        compared += 1;
    }
    assert!(compared >= 2, "only {compared} prompts were compared");
}
