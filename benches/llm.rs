//! Speed of the LLM engine on prompts of one's own.
//!
//!     cargo bench --bench llm -- --model MODEL.gguf --prompts PROMPTS.json
//!     cargo bench --bench llm -- --model MODEL.gguf --worker
//!
//! PROMPTS.json is `{"prompts": [{"text": ..}, ..]}` with complete chat texts. The first form prints one
//! JSON object: wall and CPU seconds of the `label` mode over all prompts (the common prefix shared), of reading
//! the first prompt, and of 64 greedy tokens after it. The second speaks with `peers/bench_llm.py`
//! (`--batch-command`): says `{"ready": true}`, then answers each line `{"ids": [[..], ..]}` with the likeliest next
//! token of every prompt. `RAYON_NUM_THREADS` sets the number of threads.
#![allow(clippy::unwrap_used, clippy::print_stdout, dead_code)]

use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

use serde_json::{Value as Json, json};
use tailfuse::device::DeviceChoice;
use tailfuse::llm::Llm;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |name: &str| arguments.iter().position(|a| a == name).and_then(|i| arguments.get(i + 1)).cloned();
    let Some(model) = value("--model") else {
        println!("give --model FILE and --prompts FILE (see the head of benches/llm.rs)");
        return;
    };
    let llm = Llm::open(Path::new(&model), DeviceChoice::Cpu).unwrap();
    if arguments.iter().any(|a| a == "--worker") {
        return worker(&llm);
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
    let tokens: usize = prompts.iter().map(Vec::len).sum();
    let labels = vec![tokenizer.encode_text("A"); prompts.len()];
    let label = timed(|| drop(llm.label_logprobs(&prompts, &labels, &mut |_| Ok(())).unwrap()));
    let read = timed(|| drop(llm.logits(&prompts[0]).unwrap()));
    let generate = timed(|| drop(llm.generate(&prompts[0], 64, &[]).unwrap()));
    let report = json!({
        "threads": rayon::current_num_threads(), "prompts": prompts.len(), "tokens": tokens,
        "label": label, "prompts_per_wall_s": prompts.len() as f64 / label["wall_s"].as_f64().unwrap(),
        "read_first": read, "first_tokens": prompts[0].len(), "read_first_and_generate_64": generate,
    });
    println!("{report}");
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
fn worker(llm: &Llm) {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{}", json!({"ready": true})).unwrap();
    output.flush().unwrap();
    for line in std::io::stdin().lock().lines() {
        let request: Json = serde_json::from_str(&line.unwrap()).unwrap();
        let prompts: Vec<Vec<u32>> = serde_json::from_value(request["ids"].clone()).unwrap();
        let best = llm.next_tokens(&prompts, &mut |_| Ok(())).unwrap();
        writeln!(output, "{}", json!({"best": best})).unwrap();
        output.flush().unwrap();
    }
}
