//! Logits, losses, gradients and steps against PyTorch's (`tests/golden/llm/tiny`, `tiny_untied`).

use std::path::{Path, PathBuf};

use burn::backend::Flex;
use serde_json::Value as Json;

use super::tuner::Tuner;
use super::{Adapter, Batch, Decoder, Example, LoraFile, Parts};
use crate::llm::weights::Weights;
use crate::recommenders::optim::{Adam, Params};
use crate::recommenders::saved::{NamedTensor, read_f32};

pub fn folder(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/llm")).join(name)
}

/// A model with all weights learned.
pub fn whole(name: &str, recompute: bool) -> Tuner<Flex> {
    let weights = Weights::open(&folder(name)).unwrap();
    let mut base = Params::new(&Default::default());
    let decoder = Decoder::load(&weights, Parts { layers: None, text: true }, &mut base).unwrap();
    Tuner { decoder, base, adapter: None, dropout: 0.0, recompute }
}

fn golden(name: &str) -> Json {
    serde_json::from_slice(&std::fs::read(folder(name).join("golden.json")).unwrap()).unwrap()
}

fn numbers(json: &Json) -> Vec<f64> {
    json.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

pub fn examples(golden: &Json) -> Vec<Example> {
    let sequences = golden["sequences"].as_array().unwrap();
    let example = |s: &Json| Example {
        ids: numbers(&s["ids"]).iter().map(|&id| id as u32).collect(),
        learned: numbers(&s["response_mask"]).iter().map(|&m| m == 1.0).collect(),
    };
    sequences.iter().map(example).collect()
}

fn l2(tensor: &NamedTensor) -> f64 {
    tensor.values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

fn relative(what: &str, got: f64, want: f64, tolerance: f64) {
    assert!((got - want).abs() <= tolerance * want.abs(), "{what}: {got} is not {want}");
}

fn by_name<'a>(tensors: &'a [NamedTensor], name: &str) -> &'a NamedTensor {
    tensors.iter().find(|t| t.name == name).unwrap_or_else(|| panic!("no tensor {name}"))
}

/// Every value of a safetensors file, to a share of each tensor's greatest.
fn values_agree(tensors: &[NamedTensor], file: &Path, tolerance: f32) {
    let want = read_f32(&std::fs::read(file).unwrap(), "golden").unwrap();
    assert_eq!(want.len(), tensors.len());
    for want in &want {
        let got = by_name(tensors, &want.name);
        assert_eq!(got.shape, want.shape);
        let most = want.values.iter().fold(0f32, |m, x| m.max(x.abs()));
        for (n, (x, y)) in got.values.iter().zip(&want.values).enumerate() {
            assert!((x - y).abs() <= tolerance * most, "{} {n}: {x} is not {y}", want.name);
        }
    }
}

#[test]
fn logits_of_every_position() {
    for name in ["tiny", "tiny_untied"] {
        let (tuner, golden) = (whole(name, false), golden(name));
        for (example, rows) in examples(&golden).iter().zip(golden["logits"].as_array().unwrap()) {
            let got = tuner.logits(&example.ids);
            let want: Vec<f64> = rows.as_array().unwrap().iter().flat_map(numbers).collect();
            assert_eq!(got.len(), want.len());
            for (x, y) in got.iter().zip(want) {
                assert!((f64::from(*x) - y).abs() < 1e-4, "{name}: {x} is not {y}");
            }
        }
    }
}

#[test]
fn losses_and_gradients_of_packed_examples() {
    for (name, recompute) in [("tiny", false), ("tiny", true), ("tiny_untied", false), ("tiny_untied", true)] {
        let (tuner, golden) = (whole(name, recompute), golden(name));
        let batch = Batch::of(&examples(&golden));
        assert_eq!(batch.targets.len() as u64, golden["batch"]["masked_tokens"].as_u64().unwrap());
        let share = 1.0 / batch.targets.len() as f64;
        let mut gradients = tuner.base.no_gradients();
        let loss = tuner.gradients(&batch, share, 0, &mut gradients) * share;
        relative(name, loss, golden["batch"]["loss"].as_f64().unwrap(), 1e-5);
        let without: f64 = tuner.losses(&batch).iter().map(|&x| f64::from(x)).sum();
        relative(name, without * share, loss, 1e-7);
        for (example, want) in examples(&golden).iter().zip(golden["sequences"].as_array().unwrap()) {
            let alone = tuner.losses(&Batch::of([example]));
            let mean = alone.iter().map(|&x| f64::from(x)).sum::<f64>() / alone.len() as f64;
            relative(name, mean, want["loss"].as_f64().unwrap(), 1e-5);
        }
        let named = tuner.base.named(&gradients);
        for (parameter, want) in golden["grad_l2"].as_object().unwrap() {
            relative(parameter, l2(by_name(&named, parameter)), want.as_f64().unwrap(), 1e-5);
        }
        relative("norm", gradients.norm(), golden["grad_l2_global"].as_f64().unwrap(), 1e-5);
        values_agree(&named, &folder(name).join("grads.safetensors"), 1e-5);
    }
}

#[test]
fn five_steps_of_adamw() {
    for (name, recompute) in [("tiny", false), ("tiny_untied", true)] {
        let (mut tuner, golden) = (whole(name, recompute), golden(name));
        let examples = examples(&golden);
        let share = 1.0 / Batch::of(&examples).targets.len() as f64;
        let adam = Adam { decay: 0.01, ..Adam::new(1e-3) };
        let want = numbers(&golden["adamw"]["losses"]);
        // Both examples at once, and one after the other.
        let batches = if recompute { Batch::split(&examples, 1) } else { vec![Batch::of(&examples)] };
        for (step, want) in want.iter().enumerate() {
            let mut gradients = tuner.base.no_gradients();
            let mut loss = 0.0;
            for batch in &batches {
                loss += tuner.gradients(batch, share, 0, &mut gradients) * share;
            }
            assert!((loss - want).abs() < 1e-5, "{name} after {step} steps: {loss} is not {want}");
            if step < 5 {
                tuner.base.apply(gradients, &adam);
            }
        }
        let after = tuner.base.tensors();
        for (parameter, want) in golden["adamw"]["param_l2_after"].as_object().unwrap() {
            relative(parameter, l2(by_name(&after, parameter)), want.as_f64().unwrap(), 1e-6);
        }
        values_agree(&after, &folder(name).join("after5.safetensors"), 1e-5);
    }
}

#[test]
fn a_prefix_of_the_layers_reads_no_others() {
    let weights = Weights::open(&folder("tiny")).unwrap();
    let mut params = Params::<Flex>::new(&Default::default());
    let decoder = Decoder::load(&weights, Parts { layers: Some(1), text: false }, &mut params).unwrap();
    assert_eq!(params.len(), 10);
    let vars = params.constants();
    let x = burn::tensor::Tensor::<Flex, 2>::ones([5, 32], &Default::default());
    let hidden = decoder.hidden(&super::Reads::whole(&vars), x, &decoder.packed(&[2, 3]));
    assert_eq!(hidden.dims(), [5, 32]);
    for layers in [0, 3] {
        let error = Decoder::load(&weights, Parts { layers: Some(layers), text: false }, &mut params).unwrap_err();
        assert_eq!(error.fault.exit_code(), 78);
    }
}

fn tuning() -> Json {
    serde_json::from_slice(&std::fs::read(folder("tuning/golden.json")).unwrap()).unwrap()
}

/// The examples of a case of `peers/golden_tuning.py`, packed, and one over the number of their learned tokens.
fn packed(case: &Json) -> (Batch, f64) {
    let sequences = case["sequences"].as_array().unwrap();
    let examples: Vec<Example> = sequences
        .iter()
        .map(|s| Example {
            ids: numbers(&s["ids"]).iter().map(|&id| id as u32).collect(),
            learned: numbers(&s["mask"]).iter().map(|&m| m == 1.0).collect(),
        })
        .collect();
    let batch = Batch::of(&examples);
    let share = 1.0 / batch.targets.len() as f64;
    (batch, share)
}

fn steps_agree(tuner: &mut Tuner<Flex>, case: &Json, learning_rate: f64) {
    let (batch, share) = packed(case);
    let losses = numbers(&case["losses"]);
    for (step, want) in losses.iter().enumerate() {
        let mut gradients = tuner.learned().no_gradients();
        let loss = tuner.gradients(&batch, share, 0, &mut gradients) * share;
        assert!((loss - want).abs() < 2e-5, "after {step} steps: {loss} is not {want}");
        if step == 0 {
            let named = tuner.learned().named(&gradients);
            for (parameter, want) in case["grad_l2"].as_object().unwrap() {
                relative(parameter, l2(by_name(&named, parameter)), want.as_f64().unwrap(), 2e-5);
            }
        }
        let adam = Adam { decay: 0.01, ..Adam::new(learning_rate) };
        tuner.learned_mut().apply(gradients, &adam);
    }
}

#[test]
fn gradients_of_biases_head_norms_and_scaled_positions() {
    for (name, case) in tuning()["families"].as_object().unwrap() {
        for recompute in [false, true] {
            steps_agree(&mut whole(name, recompute), case, 1e-3);
        }
    }
}

/// `tiny` with the adapter of `tuning/lora`, which is what is learned.
fn adapted(recompute: bool) -> Tuner<Flex> {
    let mut tuner = whole("tiny", recompute);
    let file = LoraFile::open(&folder("tuning/lora")).unwrap();
    let mut params = Params::new(&Default::default());
    let adapter = Adapter::of_file(tuner.decoder.config(), &file, &mut params).unwrap();
    tuner.adapter = Some((adapter, params));
    tuner
}

#[test]
fn an_adapter_of_peft_has_its_logits_gradients_and_steps() {
    let golden = &tuning()["lora"];
    let want: Vec<f64> = golden["logits"].as_array().unwrap().iter().flat_map(numbers).collect();
    let ids: Vec<u32> = numbers(&golden["sequences"][0]["ids"]).iter().map(|&id| id as u32).collect();
    let file = LoraFile::open(&folder("tuning/lora")).unwrap();
    let weights = Weights::open(&folder("tiny")).unwrap().with_adapter(Some(file.clone())).unwrap();
    let merged = crate::llm::cpu::CpuModel::load(&weights, crate::llm::cpu::kernels::Isa::detect()).unwrap();
    let merged = crate::llm::engine::Local::new(merged, crate::llm::LlmOptions::default());
    let last = crate::llm::engine::Engine::logits(&merged, &ids).unwrap();
    let by_blocks = |name: &str| {
        let blocks = weights.blocks(name).unwrap();
        let mut values = vec![0f32; blocks.rows * blocks.columns];
        blocks.block_type.dequantize(&blocks.bytes, &mut values);
        values
    };
    for name in ["model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"] {
        assert_eq!(by_blocks(name), weights.values(name).unwrap());
    }
    for recompute in [false, true] {
        let mut tuner = adapted(recompute);
        for (x, y) in tuner.logits(&ids).iter().chain(&last).zip(want.iter().chain(&want[want.len() - 64..])) {
            assert!((f64::from(*x) - y).abs() < 1e-4, "{x} is not {y}");
        }
        let base = tuner.base.tensors();
        steps_agree(&mut tuner, golden, 1e-2);
        assert_eq!(base, tuner.base.tensors(), "the base is not learned");
    }
    assert!(Weights::open(&folder("qwen2")).unwrap().with_adapter(Some(file)).is_err());
}

#[test]
fn dropout_is_the_same_when_layers_are_computed_again() {
    let (batch, share) = packed(&tuning()["lora"]);
    let run = |recompute: bool, dropout: f32, seed: u64| {
        let tuner = Tuner { dropout, ..adapted(recompute) };
        let mut gradients = tuner.learned().no_gradients();
        let loss = tuner.gradients(&batch, share, seed, &mut gradients);
        (loss, tuner.learned().named(&gradients))
    };
    let ((a, grads_a), (b, grads_b)) = (run(false, 0.3, 7), run(true, 0.3, 7));
    assert_eq!(a, b);
    for (x, y) in grads_a.iter().zip(&grads_b).flat_map(|(a, b)| a.values.iter().zip(&b.values)) {
        assert!((x - y).abs() < 1e-5, "{x} is not {y}");
    }
    assert_ne!(a, run(false, 0.3, 8).0);
    assert_ne!(a, run(false, 0.0, 7).0);
}
