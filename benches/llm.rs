//! Speed of the LLM engine on prompts of one's own, and how far the precisions are from f32.
//!
//!     cargo bench --bench llm -- --model MODEL.gguf --prompts PROMPTS.json
//!     cargo bench --bench llm -- --model MODEL.gguf --prompts PROMPTS.json --compare
//!     cargo bench --bench llm -- --model MODEL.gguf --worker
//!
//! PROMPTS.json is `{"prompts": [{"text": ..}, ..]}` with complete chat texts. The first form prints one
//! JSON object: wall and CPU seconds of the `label` mode over all prompts (the common prefix shared), of reading
//! the first prompt, and of 64 greedy tokens after it. The second prints, for each precision, the largest difference of a logit
//! from f32 and how often the order of the labels A to T, and the first of them, is f32's. The third speaks with
//! `peers/bench_llm.py`: says `{"ready": true, "load_s": ..}`, then answers each line `{"ids": [[..], ..]}` with the
//! likeliest next token of every prompt, and, where the line has `"top": n`, with the n likeliest and their log-probabilities.
//! `--precision auto | f32 | int16 | int8` goes with each. `RAYON_NUM_THREADS` sets the number of threads.
#![allow(clippy::unwrap_used, clippy::print_stdout, dead_code)]

use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

use serde_json::{Value as Json, json};
use tailfuse::device::DeviceChoice;
use tailfuse::llm::scoring::{normalizer, top};
use tailfuse::llm::{Llm, LlmOptions, Precision};

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |name: &str| arguments.iter().position(|a| a == name).and_then(|i| arguments.get(i + 1)).cloned();
    let flag = |name: &str| arguments.iter().any(|a| a == name);
    let Some(model) = value("--model") else {
        println!("give --model FILE and --prompts FILE (see the head of benches/llm.rs)");
        return;
    };
    let open = |precision: Precision| {
        let started = Instant::now();
        let options = LlmOptions { precision, ..LlmOptions::default() };
        let llm = Llm::open_with(Path::new(&model), DeviceChoice::Cpu, options).unwrap();
        (llm, started.elapsed().as_secs_f64())
    };
    let precision = match value("--precision").as_deref() {
        Some("f32") => Precision::F32,
        Some("int16") => Precision::Int16,
        Some("int8") => Precision::Int8,
        _ => Precision::Auto,
    };
    let (llm, load_s) = open(precision);
    if flag("--worker") {
        return worker(&llm, load_s);
    }
    let Some(prompts) = value("--prompts") else { return println!("give --prompts FILE") };
    let texts: Json = serde_json::from_slice(&std::fs::read(prompts).unwrap()).unwrap();
    let tokenizer = llm.chat().tokenizer().unwrap();
    let prompts: Vec<Vec<u32>> = texts["prompts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| tokenizer.encode_special(p["text"].as_str().unwrap()))
        .collect();
    if flag("--compare") {
        let (reference, _) = open(Precision::F32);
        for precision in [Precision::Int16, Precision::Int8] {
            println!("{}", compare(&open(precision).0, &reference, &prompts, precision));
        }
        return;
    }
    let tokens: usize = prompts.iter().map(Vec::len).sum();
    let labels = vec![tokenizer.encode_text("A"); prompts.len()];
    let timed = |work: &dyn Fn()| {
        timed(|| {
            llm.forget();
            work();
        })
    };
    let label = timed(&|| drop(llm.label_logprobs(&prompts, &labels, &mut |_| Ok(())).unwrap()));
    let read = timed(&|| drop(llm.logits(&prompts[0]).unwrap()));
    let generate = timed(&|| drop(llm.generate(&prompts[0], 64, &[]).unwrap()));
    let report = json!({
        "threads": rayon::current_num_threads(), "prompts": prompts.len(), "tokens": tokens, "load_s": load_s,
        "label": label, "prompts_per_wall_s": prompts.len() as f64 / label["wall_s"].as_f64().unwrap(),
        "read_first": read, "first_tokens": prompts[0].len(), "read_first_and_generate_64": generate,
    });
    println!("{report}");
}

/// How far a precision is from f32, over the logits after each prompt.
fn compare(llm: &Llm, reference: &Llm, prompts: &[Vec<u32>], precision: Precision) -> Json {
    let labels: Vec<u32> = ('A'..='T').map(|l| llm.chat().encode_text(&l.to_string())[0]).collect();
    let order = |logits: &[f32]| {
        let mut order = labels.clone();
        order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
        order
    };
    let (mut largest, mut of_std, mut same, mut first, mut pairs) = (0f64, 0f64, 0, 0, 0);
    for prompt in prompts {
        let (got, want) = (llm.logits(prompt).unwrap(), reference.logits(prompt).unwrap());
        let difference = got.iter().zip(&want).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
        let mean = want.iter().map(|v| f64::from(*v)).sum::<f64>() / want.len() as f64;
        let variance = want.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / want.len() as f64;
        largest = largest.max(difference);
        of_std = of_std.max(difference / variance.sqrt());
        let (got, want) = (order(&got), order(&want));
        same += usize::from(got == want);
        first += usize::from(got[0] == want[0]);
        let place = |of: &[u32], label: u32| of.iter().position(|l| *l == label).unwrap();
        for (i, a) in want.iter().enumerate() {
            pairs += want[i + 1..].iter().filter(|b| place(&got, *a) > place(&got, **b)).count();
        }
    }
    json!({
        "precision": format!("{precision:?}"), "prompts": prompts.len(), "largest_logit_difference": largest, "of_std": of_std,
        "same_label_order": same, "same_first_label": first, "pairs_of_labels_swapped": pairs,
        "pairs_of_labels": prompts.len() * labels.len() * (labels.len() - 1) / 2,
    })
}

/// Median wall and CPU seconds of three runs.
fn timed(work: impl Fn()) -> Json {
    let mut runs: Vec<(f64, f64)> = (0..3)
        .map(|_| {
            let (cpu, wall) = (cpu_seconds(), Instant::now());
            work();
            (wall.elapsed().as_secs_f64(), cpu_seconds() - cpu)
        })
        .collect();
    runs.sort_by(|a, b| a.0.total_cmp(&b.0));
    json!({"wall_s": runs[1].0, "cpu_s": runs[1].1})
}

/// User and system seconds of this process.
fn cpu_seconds() -> f64 {
    // SAFETY: all-zero bytes are a valid `rusage`, and `getrusage` writes one to a valid place.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 * 1e-6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Answers passes over prompts until the input ends.
fn worker(llm: &Llm, load_s: f64) {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{}", json!({"ready": true, "load_s": load_s})).unwrap();
    output.flush().unwrap();
    for line in std::io::stdin().lock().lines() {
        let request: Json = serde_json::from_str(&line.unwrap()).unwrap();
        let prompts: Vec<Vec<u32>> = serde_json::from_value(request["ids"].clone()).unwrap();
        let answer = match request["top"].as_u64() {
            Some(n) => {
                let likeliest = |prompt: &Vec<u32>| {
                    let logits = llm.logits(prompt).unwrap();
                    let sum = normalizer(&logits);
                    let rows = top(&logits, n as usize);
                    rows.into_iter().map(|(id, l)| json!([id, f64::from(l) - sum])).collect::<Json>()
                };
                json!({"top": prompts.iter().map(likeliest).collect::<Json>()})
            }
            None => {
                // Nothing is left of the pass before.
                llm.forget();
                json!({"best": llm.next_tokens(&prompts, &mut |_| Ok(())).unwrap()})
            }
        };
        writeln!(output, "{answer}").unwrap();
        output.flush().unwrap();
    }
}
