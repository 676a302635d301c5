//! The bound on memory against the allocations that are made.

use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};

use super::*;
use crate::llm::cpu::CpuModel;
use crate::llm::cpu::kernels::Isa;
use crate::llm::engine::{Engine, Local, ScoreRequest};
use crate::llm::hostile::{held, peak_of};
use crate::llm::model::{BurnModel, Placement};
use crate::llm::ranking::RankRequest;
use crate::llm::weights::Weights;

/// A model of random weights that is large enough for its lists to be small beside them.
fn write_model(folder: &Path) {
    let (vocab, hidden, inner, layers) = (800usize, 64usize, 160usize, 3usize);
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 700, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": true,
        "hidden_act": "silu",
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
    shapes.push(("model.norm.weight".to_owned(), vec![hidden]));
    for layer in 0..layers {
        for (leaf, shape) in [
            ("input_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![hidden, hidden]),
            ("self_attn.k_proj", vec![hidden / 2, hidden]),
            ("self_attn.v_proj", vec![hidden / 2, hidden]),
            ("self_attn.o_proj", vec![hidden, hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("mlp.gate_proj", vec![inner, hidden]),
            ("mlp.up_proj", vec![inner, hidden]),
            ("mlp.down_proj", vec![hidden, inner]),
        ] {
            shapes.push((format!("model.layers.{layer}.{leaf}.weight"), shape));
        }
    }
    let bytes: Vec<Vec<u8>> = shapes
        .iter()
        .map(|(_, s)| {
            (0..s.iter().product::<usize>())
                .flat_map(|i| (((i * 37 % 101) as f32 - 50.0) / 500.0).to_le_bytes())
                .collect()
        })
        .collect();
    let views = shapes
        .iter()
        .zip(&bytes)
        .map(|((name, shape), bytes)| (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

/// Calls of all modes, with prompts of up to the context.
fn work(engine: &dyn Engine) {
    let prompt = |i: usize, len: usize| -> Vec<u32> {
        (0..len).map(|t| if t < 30 { t as u32 } else { ((t * 13 + i * 7) % 800) as u32 }).collect()
    };
    let prompts: Vec<Vec<u32>> = (0..9).map(|i| prompt(i, 20 + i * 29)).chain([prompt(50, 700)]).collect();
    let labels: Vec<Vec<u32>> = prompts.iter().map(|_| (0..20).map(|l| l * 37).collect()).collect();
    engine.label_logprobs_among(&prompts, &labels, &mut |_| Ok(())).unwrap();
    engine.label_logprobs(&prompts, &labels, &mut |_| Ok(())).unwrap();
    let short = &prompts[..5];
    let scores: Vec<ScoreRequest> = short
        .iter()
        .map(|p| ScoreRequest {
            prompt: p.clone(),
            continuations: (0..10).map(|c| prompt(c, 34)[29..].to_vec()).collect(),
        })
        .collect();
    engine.continuation_logprobs(&scores, &mut |_| Ok(())).unwrap();
    let ranks: Vec<RankRequest> = short
        .iter()
        .map(|p| RankRequest {
            prompt: p.clone(),
            candidates: (0..12).map(|c| [prompt(c, 33)[29..].to_vec(), vec![799]].concat()).collect(),
            leads: vec![],
        })
        .collect();
    engine.rank_by_generation(&ranks, &mut |_| Ok(())).unwrap();
    engine.hidden_means(short, &mut |_| Ok(())).unwrap();
}

/// What a call takes is within the bound, and the bound is no more than a few times that.
fn check<D: Decoder>(name: &str, load: impl Fn() -> D + Send + Sync, tight: usize) {
    // All of the work in the thread that counts.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| {
        let before = held();
        let decoder = load();
        let weights = (held() - before) as usize;
        assert!(decoder.weight_bytes().abs_diff(weights) < weights / 20, "{name}: {weights}");
        let mut closest = usize::MAX;
        for (batch, held) in [(64, 0), (256, 300)] {
            let options = LlmOptions {
                batch_tokens: Some(batch),
                kv_bytes: held * decoder.token_bytes(),
                ..LlmOptions::default()
            };
            let bound = Memory::bound(&decoder, &options);
            let engine = Local::new(&decoder, options);
            let ((), most) = peak_of(|| work(&engine));
            let bound = bound.kv + bound.pass;
            assert!(most <= bound, "{name}, batch {batch}, held {held}: {most} bytes were taken, {bound} is the bound");
            closest = closest.min(bound / most);
        }
        assert!(closest < tight, "{name}: the bound is {closest} times what was ever taken");
    });
}

#[test]
fn memory_stays_within_the_bound() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path());
    let weights = Weights::open(folder.path()).unwrap();
    let cpu = CpuModel::load(&weights, Isa::detect()).unwrap();
    let (known, before) = {
        let options = LlmOptions::default();
        (Memory::bound(&cpu, &options), Memory::before_loading(weights.config(), &options))
    };
    assert!(known.weights <= before.weights && before.weights < known.weights * 21 / 20);
    assert_eq!((known.kv, known.pass), (before.kv, before.pass));
    drop(cpu);
    check("cpu", || CpuModel::load(&weights, Isa::detect()).unwrap(), 3);
    let burn = || -> BurnModel<burn::backend::Flex> {
        BurnModel::load(&weights, &Default::default(), Placement::default()).unwrap()
    };
    check("burn", burn, 12);
}
