//! One request gives the same numbers alone and in any company: with any batches, budgets and history of calls.

use std::path::Path;
use std::sync::LazyLock;

use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::llm::cpu::CpuModel;
use crate::llm::cpu::kernels::Isa;
use crate::llm::model::{BurnModel, Placement};
use crate::llm::options::Half;
use crate::llm::weights::Weights;

fn weights() -> Weights {
    Weights::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llm/tiny")).unwrap()
}

type Burn = BurnModel<burn::backend::Flex>;

static CPU: LazyLock<CpuModel> = LazyLock::new(|| CpuModel::load(&weights(), Isa::detect()).unwrap());

fn burn(half: bool) -> Burn {
    BurnModel::load(&weights(), &Default::default(), Placement { half, gpu: false }).unwrap()
}

/// An engine with batches of `batch` tokens and room for the keys and values of `held`.
fn engine<D: Decoder>(decoder: &D, batch: usize, held: usize) -> Local<&D> {
    let kv_bytes = held * decoder.token_bytes();
    Local::new(decoder, LlmOptions { batch_tokens: Some(batch), kv_bytes, half: Half::Never, ..LlmOptions::default() })
}

/// What is asked in one call.
#[derive(Clone, Debug)]
enum Call {
    Labels(Vec<Vec<u32>>, Vec<Vec<u32>>),
    Among(Vec<Vec<u32>>, Vec<Vec<u32>>),
    Scores(Vec<ScoreRequest>),
    Ranks(Vec<RankRequest>),
    Rates(Vec<Vec<u32>>, bool),
    Hidden(Vec<Vec<u32>>),
    Text(Vec<u32>, usize),
}

/// Numbers and choices of one request.
#[derive(Clone, Debug, PartialEq)]
struct Answer(Vec<f64>, Vec<u32>);

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

fn scale(long: bool) -> RatingScale {
    let ratings = if long {
        vec![(1.0, vec![5]), (1.5, vec![5, 6, 7]), (10.0, vec![5, 8])]
    } else {
        (1..=5).map(|v| (f64::from(v), vec![20 + v as u32])).collect()
    };
    RatingScale::from_tokens(ratings, &[2]).unwrap()
}

impl Call {
    /// Answers per request; `finished` counts what progress says.
    fn ask(&self, engine: &dyn Engine) -> Vec<Answer> {
        let mut finished = 0;
        let mut progress = |n: usize| {
            finished += n;
            Ok(())
        };
        let rows = |rows: Vec<Vec<f32>>| rows.iter().map(|r| Answer(wide(r), vec![])).collect::<Vec<_>>();
        let out = match self {
            Call::Labels(prompts, labels) => rows(engine.label_logprobs(prompts, labels, &mut progress).unwrap()),
            Call::Among(prompts, labels) => rows(engine.label_logprobs_among(prompts, labels, &mut progress).unwrap()),
            Call::Hidden(texts) => rows(engine.hidden_means(texts, &mut progress).unwrap()),
            Call::Scores(requests) => {
                let scores = engine.continuation_logprobs(requests, &mut progress).unwrap();
                scores.iter().map(|s| Answer(wide(&s.concat()), vec![])).collect()
            }
            Call::Ranks(requests) => {
                let ranked = engine.rank_by_generation(requests, &mut progress).unwrap();
                ranked.into_iter().map(|r| Answer(r.logprobs, r.order.iter().map(|o| *o as u32).collect())).collect()
            }
            Call::Rates(prompts, long) => {
                let ratings = engine.rate(prompts, &scale(*long), &mut progress).unwrap();
                let answer = |r: Rating| Answer([vec![r.expected, r.greedy], r.probabilities].concat(), vec![]);
                ratings.into_iter().map(answer).collect()
            }
            Call::Text(prompt, n) => {
                finished += 1;
                vec![Answer(vec![], engine.generate(prompt, *n, &[9]).unwrap())]
            }
        };
        assert_eq!(finished, out.len(), "progress tells of every request");
        out
    }

    /// The same requests, one call each.
    fn apart(&self) -> Vec<Call> {
        let pairs = |p: &[Vec<u32>], l: &[Vec<u32>], call: fn(Vec<Vec<u32>>, Vec<Vec<u32>>) -> Call| {
            p.iter().zip(l).map(|(p, l)| call(vec![p.clone()], vec![l.clone()])).collect()
        };
        match self {
            Call::Labels(p, l) => pairs(p, l, Call::Labels),
            Call::Among(p, l) => pairs(p, l, Call::Among),
            Call::Scores(requests) => requests.iter().map(|r| Call::Scores(vec![r.clone()])).collect(),
            Call::Ranks(requests) => requests.iter().map(|r| Call::Ranks(vec![r.clone()])).collect(),
            Call::Rates(prompts, long) => prompts.iter().map(|p| Call::Rates(vec![p.clone()], *long)).collect(),
            Call::Hidden(texts) => texts.iter().map(|t| Call::Hidden(vec![t.clone()])).collect(),
            Call::Text(prompt, n) => vec![Call::Text(prompt.clone(), *n)],
        }
    }
}

/// A random call: prompts that share beginnings with each other and with other calls.
fn random_call(rng: &mut ChaCha8Rng) -> Call {
    let prompt = |rng: &mut ChaCha8Rng| -> Vec<u32> {
        let common = rng.random_range(0..60u32);
        let tail = rng.random_range(1..12usize);
        let mut ids: Vec<u32> = (0..common).map(|i| (i * 11 + 5) % 64).collect();
        ids.extend((0..tail).map(|_| rng.random_range(0..3u32)));
        ids
    };
    let list = |rng: &mut ChaCha8Rng, most: usize, of: u32| -> Vec<u32> {
        (0..rng.random_range(1..=most)).map(|_| rng.random_range(0..of)).collect()
    };
    let n = rng.random_range(1..7);
    let prompts: Vec<Vec<u32>> = (0..n).map(|_| prompt(rng)).collect();
    let labels: Vec<Vec<u32>> = (0..n).map(|_| list(rng, 5, 64)).collect();
    match rng.random_range(0..7) {
        0 => Call::Labels(prompts, labels),
        1 => Call::Among(prompts, labels),
        2 => {
            let request = |prompt: Vec<u32>| ScoreRequest {
                prompt,
                continuations: (0..rng.random_range(1..4)).map(|_| list(rng, 6, 4)).collect(),
            };
            Call::Scores(prompts.into_iter().map(request).collect())
        }
        3 => {
            let request = |prompt: Vec<u32>| {
                let end = [62u32];
                let candidates =
                    (0..rng.random_range(1..7)).map(|_| [list(rng, 3, 4), end.to_vec()].concat()).collect();
                let leads = if rng.random() { (0..6).map(|r| vec![40 + r, 3]).collect() } else { vec![] };
                RankRequest { prompt, candidates, leads }
            };
            Call::Ranks(prompts.into_iter().map(request).collect())
        }
        4 => Call::Rates(prompts, rng.random()),
        5 => Call::Hidden(prompts),
        _ => Call::Text(prompts[0].clone(), rng.random_range(0..9)),
    }
}

/// The answers to a call when each request is alone and nothing was asked before.
fn alone<D: Decoder>(decoder: &D, call: &Call) -> Vec<Answer> {
    call.apart().iter().flat_map(|one| one.ask(&engine(decoder, 4096, 0))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// On the CPU, to the bit.
    #[test]
    fn company_does_not_change_results(seed: u64, batch in 1usize..150, held in 0usize..300) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let engine = engine(&*CPU, batch, held);
        for _ in 0..4 {
            let call = random_call(&mut rng);
            prop_assert_eq!(call.ask(&engine), alone(&*CPU, &call), "{:?}", call);
            let tree = engine.tree.lock().unwrap();
            prop_assert!(tree.bytes() <= held * CPU.token_bytes());
        }
    }
}

/// On any Burn back end, to 1e-4; and the same as on the CPU.
#[test]
fn company_does_not_change_results_on_burn() {
    let (burn, mut rng) = (burn(false), ChaCha8Rng::seed_from_u64(5));
    for (batch, held) in [(1, 0), (7, 40), (50, 150), (100, 100), (4096, 4096)] {
        let engine = engine(&burn, batch, held);
        for _ in 0..if batch == 1 { 2 } else { 6 } {
            let call = random_call(&mut rng);
            for (got, want) in call.ask(&engine).iter().zip(&alone(&*CPU, &call)) {
                assert_eq!(got.1, want.1, "{call:?}");
                for (got, want) in got.0.iter().zip(&want.0) {
                    assert!((got - want).abs() < 1e-4, "{call:?}: {got}, not {want}");
                }
            }
        }
    }
}

/// bfloat16 has 8 bits: the tiny model's log-probabilities are off by less than a tenth.
#[test]
fn half_precision_is_close() {
    let burn = burn(true);
    let half = engine(&burn, 100, 200);
    let prompts: Vec<Vec<u32>> = (1..20u32).map(|n| (0..n * 3).map(|i| (i * 7 + n) % 64).collect()).collect();
    let call = Call::Labels(prompts.clone(), vec![vec![1, 9, 33]; prompts.len()]);
    let mut largest = 0f64;
    for (got, want) in call.ask(&half).iter().zip(alone(&*CPU, &call)) {
        got.0.iter().zip(want.0).for_each(|(g, w)| largest = largest.max((g - w).abs()));
    }
    assert!(largest > 1e-5 && largest < 0.1, "{largest}");
    assert_eq!(2 * half.decoder.token_bytes(), CPU.token_bytes());
}

/// The greedy list is what choosing token by token gives, with each step computed anew.
#[test]
fn a_list_is_written_as_step_by_step() {
    let candidates: Vec<Vec<u32>> = vec![vec![5, 62], vec![5, 6, 62], vec![9, 8, 62], vec![5, 62], vec![9, 62]];
    let request = RankRequest { prompt: vec![3, 1, 4], candidates: candidates.clone(), leads: vec![] };
    let engine = engine(&*CPU, 100, 100);
    let ranked = engine.rank_by_generation(std::slice::from_ref(&request), &mut |_| Ok(())).unwrap().remove(0);
    let mut text = request.prompt.clone();
    let mut left: Vec<usize> = (0..candidates.len()).collect();
    for (place, chosen) in ranked.order.iter().enumerate() {
        let (mut written, mut logprob) = (Vec::new(), 0f64);
        loop {
            let fits = |c: &&usize| candidates[**c].starts_with(&written);
            if let Some(done) = left.iter().copied().find(|c| candidates[*c] == written) {
                assert_eq!(done, *chosen, "place {place}");
                left.retain(|c| *c != done);
                break;
            }
            let mut allowed: Vec<u32> = left.iter().filter(fits).map(|c| candidates[*c][written.len()]).collect();
            allowed.sort_unstable();
            allowed.dedup();
            let logits = engine.logits(&[text.clone(), written.clone()].concat()).unwrap();
            let logits: Vec<f32> = allowed.iter().map(|id| logits[*id as usize]).collect();
            let best = argmax(&logits) as usize;
            logprob += f64::from(among(&logits)[best]);
            written.push(allowed[best]);
        }
        text.extend(written);
        assert!((ranked.logprobs[place] - logprob).abs() < 1e-5);
    }
    assert!(left.is_empty());
}

/// What is known is not computed again, in later calls and other modes too.
#[test]
fn known_beginnings_are_kept_between_calls() {
    let engine = engine(&*CPU, 1000, 1000);
    let prompts: Vec<Vec<u32>> = (0..4u32).map(|i| (0..50).chain([i, i]).collect()).collect();
    let labels = vec![vec![1]; 4];
    engine.label_logprobs(&prompts, &labels, &mut |_| Ok(())).unwrap();
    // 50 in common and one of each; the last position was read, so it has to be computed anew.
    assert_eq!(engine.tree.lock().unwrap().tokens(), 54);
    engine.rate(&prompts, &scale(true), &mut |_| Ok(())).unwrap();
    assert_eq!(engine.tree.lock().unwrap().tokens(), 54);
}

#[test]
fn no_prompts_are_no_work() {
    let engine = engine(&*CPU, 100, 100);
    assert!(engine.label_logprobs(&[], &[], &mut |_| Ok(())).unwrap().is_empty());
    let request = ScoreRequest { prompt: vec![1], continuations: vec![] };
    assert_eq!(engine.continuation_logprobs(&[request], &mut |_| Ok(())).unwrap(), [Vec::<Vec<f32>>::new()]);
    assert!(engine.generate(&[1], 0, &[]).unwrap().is_empty());
    let request = RankRequest { prompt: vec![1], candidates: vec![], leads: vec![] };
    let ranked = engine.rank_by_generation(&[request], &mut |_| Ok(())).unwrap();
    assert_eq!(ranked, [Ranked::default()]);
    assert!(engine.rate(&[], &scale(false), &mut |_| Ok(())).unwrap().is_empty());
}

#[test]
fn what_cannot_be_computed_is_refused() {
    let engine = engine(&*CPU, 100, 100);
    let rank = |prompt: Vec<u32>, candidates: Vec<Vec<u32>>| {
        let request = RankRequest { prompt, candidates, leads: vec![] };
        engine.rank_by_generation(&[request], &mut |_| Ok(())).unwrap_err()
    };
    assert!(rank(vec![], vec![vec![1]]).message.contains("at least 1"));
    assert!(rank(vec![1], vec![vec![64]]).message.contains("0 to 63"));
    let long = rank(vec![1; 100], vec![vec![1; 15], vec![2; 15]]);
    assert!(long.message.contains("with the 30 beside it"), "{}", long.message);
    assert_eq!(long.fault.exit_code(), 65);
}
