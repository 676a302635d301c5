//! Remote engines against real sockets: every prompt ends exactly once, whatever the server does.
//!
//! The servers are in `remote_server.rs`; the last tests ask llama.cpp's own.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use tailfuse::error::Result;
use tailfuse::llm::Llm;
use tailfuse::llm::remote::{
    Ask, EngineConfig, EngineKind, Failure, Outcome, Reading, Remote, RemoteSpec, Sink, Spent,
};

use crate::llm::smollm2;
use crate::remote_server::{Fault, LlamaServer, by_heart_server, faulty_server, proxy};

/// A patient spec with short waits.
fn spec(url: String) -> RemoteSpec {
    let config = EngineConfig {
        kind: EngineKind::Openai,
        url: Some(url),
        model: Some("m".into()),
        timeout_seconds: Some(0.3),
        backoff_seconds: Some(0.005),
        retries: Some(3),
        concurrency: Some(4),
        ..EngineConfig::default()
    };
    config.resolve().unwrap().unwrap()
}

fn asks(n: usize) -> Vec<Ask> {
    (0..n)
        .map(|i| {
            let titles: Vec<String> = (0..5).map(|c| format!("Film {i} {c}")).collect();
            let letters: Vec<char> = ('A'..='E').collect();
            let lines: Vec<String> = letters.iter().zip(&titles).map(|(l, t)| format!("{l}. {t}")).collect();
            let user = format!("User {i} likes films.\n{}\nOutput:", lines.join("\n"));
            Ask { user, titles, letters, places: vec![3, 1, 2, 5, 4], ..Ask::default() }
        })
        .collect()
}

/// Takes each outcome once.
struct Once(Vec<Option<Outcome>>);

#[async_trait]
impl Sink for Once {
    async fn take(&mut self, place: usize, outcome: Outcome) -> Result<()> {
        assert!(self.0[place].replace(outcome).is_none(), "prompt {place} ended twice");
        Ok(())
    }
}

/// Asks everything on a runtime of its own.
fn ask_all(remote: &Remote, asks: Vec<Ask>) -> (Result<()>, Vec<Option<Outcome>>) {
    let mut sink = Once(asks.iter().map(|_| None).collect());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let end = runtime.block_on(remote.ask_all(asks, &mut sink));
    (end, sink.0)
}

/// All answers; nobody may be missing.
fn all_answered(remote: &Remote, asks: Vec<Ask>) -> Vec<Vec<Vec<f32>>> {
    let (end, outcomes) = ask_all(remote, asks);
    end.unwrap();
    outcomes.into_iter().map(|o| o.expect("an outcome").expect("an answer").scores).collect()
}

/// Every fault there is, with the reason that it leaves where it stays.
fn faults() -> Vec<(Fault, &'static str)> {
    vec![
        (Fault::Slow(2_000), "timeout"),
        (Fault::Hang, "timeout"),
        (Fault::Status(429, None), "rate_limited"),
        (Fault::Status(500, None), "server_error"),
        (Fault::Status(503, Some("0.01")), "server_error"),
        (Fault::Truncated, "connection"),
        (Fault::Reset, "connection"),
        (Fault::Body(b"<html>Bad Gateway</html>"), "unparsable"),
        (Fault::Body(b""), "unparsable"),
    ]
}

#[test]
fn what_passes_is_survived() {
    let clean = by_heart_server(None, 0);
    let expected = all_answered(&Remote::new(spec(clean.url()), Reading::Label).unwrap(), asks(18));
    // Every fault meets two prompts in their first try, and another one in the second.
    let kinds = faults();
    let server = faulty_server(move |number, before| match before {
        0 => kinds[number % kinds.len()].0.clone(),
        1 => kinds[(number + 4) % kinds.len()].0.clone(),
        _ => Fault::Pass,
    });
    let mut patient = spec(server.url());
    patient.concurrency = 18;
    patient.timeout = Duration::from_millis(400);
    let remote = Remote::new(patient, Reading::Label).unwrap();
    assert_eq!(all_answered(&remote, asks(18)), expected);
    assert_eq!(Spent::of(&remote.spent().requests), 54);
    assert_eq!(Spent::of(&remote.spent().retries), 36);
    // Only answers count, not tries.
    assert_eq!(Spent::of(&remote.spent().completion_tokens), 18);
}

#[test]
fn what_stays_becomes_a_reason() {
    let mut kinds = faults();
    // Not the server's fault, and not tried again.
    kinds.push((Fault::Status(400, None), "refused"));
    kinds.push((Fault::Status(302, None), "refused"));
    kinds.push((Fault::Body(b"{\"choices\": []}"), "unparsable"));
    kinds.push((Fault::Body(b"[1, {\"a\": null}]"), "unparsable"));
    let reasons: Vec<&str> = kinds.iter().map(|k| k.1).collect();
    let schedule = kinds.clone();
    let server = faulty_server(move |number, _| schedule.get(number).map_or(Fault::Pass, |k| k.0.clone()));
    let n = kinds.len() + 6;
    let mut one_by_one = spec(server.url());
    // One at a time, so that the number of a body is the number of its prompt; and no patience.
    (one_by_one.concurrency, one_by_one.retries, one_by_one.timeout) = (1, 1, Duration::from_millis(100));
    let (end, outcomes) = ask_all(&Remote::new(one_by_one, Reading::Label).unwrap(), asks(n));
    end.unwrap();
    for (place, outcome) in outcomes.into_iter().enumerate() {
        match (outcome.expect("an outcome"), reasons.get(place)) {
            (Err(failure), Some(reason)) => assert_eq!(failure.reason(), *reason, "{:?}: {failure}", kinds[place].0),
            (Ok(reply), None) => assert_eq!(reply.scores.len(), 5),
            (other, _) => panic!("prompt {place}: {other:?}"),
        }
    }
}

#[test]
fn the_server_may_say_how_long_to_wait() {
    let server = faulty_server(|_, before| if before == 0 { Fault::Status(429, Some("1")) } else { Fault::Pass });
    let remote = Remote::new(spec(server.url()), Reading::Label).unwrap();
    let began = Instant::now();
    all_answered(&remote, asks(3));
    assert!(began.elapsed() >= Duration::from_secs(1), "{:?}", began.elapsed());
}

#[test]
fn no_more_requests_are_in_flight_than_allowed() {
    let server = by_heart_server(None, 20);
    let mut narrow = spec(server.url());
    narrow.concurrency = 3;
    all_answered(&Remote::new(narrow, Reading::Label).unwrap(), asks(15));
    assert_eq!(server.most.load(std::sync::atomic::Ordering::SeqCst), 3);
}

#[test]
fn after_the_deadline_nobody_waits() {
    let server = faulty_server(|number, _| if number < 3 { Fault::Pass } else { Fault::Hang });
    let mut hurried = spec(server.url());
    (hurried.deadline, hurried.timeout, hurried.concurrency) =
        (Some(Duration::from_millis(300)), Duration::from_secs(60), 2);
    let began = Instant::now();
    let (end, outcomes) = ask_all(&Remote::new(hurried, Reading::Label).unwrap(), asks(30));
    end.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5));
    let answered = outcomes.iter().filter(|o| matches!(o, Some(Ok(_)))).count();
    let late = outcomes.iter().filter(|o| matches!(o, Some(Err(Failure::Deadline)))).count();
    assert_eq!((answered, late), (3, 27));
}

#[test]
fn a_server_that_is_down_is_told_from_a_bad_prompt() {
    // Nobody listens there.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut nowhere = spec(format!("http://{closed}/v1"));
    nowhere.retries = 1;
    let (end, _) = ask_all(&Remote::new(nowhere, Reading::Label).unwrap(), asks(3));
    assert_eq!(end.unwrap_err().fault.exit_code(), 75);

    // It goes away on the way: what came before is handed over, and the rest is not waited for.
    let server = faulty_server(|number, _| if number < 5 { Fault::Pass } else { Fault::Reset });
    let mut short = spec(server.url());
    (short.concurrency, short.retries, short.give_up_after) = (1, 0, 4);
    let (end, outcomes) = ask_all(&Remote::new(short, Reading::Label).unwrap(), asks(40));
    assert_eq!(end.unwrap_err().fault.exit_code(), 75);
    assert_eq!(outcomes.iter().filter(|o| matches!(o, Some(Ok(_)))).count(), 5);
    assert_eq!(server.requests(), 9);
}

#[test]
fn what_the_server_cannot_do_is_said_plainly() {
    let code = |fault: Fault, reading: Reading| {
        let server = faulty_server(move |_, _| fault.clone());
        let (end, _) = ask_all(&Remote::new(spec(server.url()), reading).unwrap(), asks(3));
        let error = end.unwrap_err();
        (error.fault.exit_code(), error.to_string())
    };
    let no_logprobs = Fault::Body(b"{\"choices\": [{\"message\": {\"role\": \"assistant\", \"content\": \"A\"}}]}");
    let (exit, text) = code(no_logprobs, Reading::Label);
    assert!(exit == 78 && text.contains("log-probabilities") && text.contains("generate"), "{text}");
    for status in [401, 403, 404] {
        let (exit, text) = code(Fault::Status(status, None), Reading::Generate);
        assert!(exit == 78 && text.contains("engine."), "{status}: {text}");
    }
    let mut llama = spec("http://127.0.0.1:1/v1".into());
    llama.dialect = tailfuse::llm::remote::Dialect::LlamaCpp;
    let error = Remote::new(llama, Reading::Likelihood).unwrap_err();
    assert!(error.fault.exit_code() == 78 && error.to_string().contains("prompt's own tokens"), "{error}");
}

#[test]
fn written_orders_hold_every_candidate_once() {
    let server = by_heart_server(None, 0);
    for structured in [tailfuse::llm::remote::Structured::JsonSchema] {
        let mut how = spec(server.url());
        how.structured = structured;
        for scores in all_answered(&Remote::new(how, Reading::Generate).unwrap(), asks(6)) {
            let mut places: Vec<i64> = scores.iter().map(|s| s[0] as i64).collect();
            places.sort_unstable();
            assert_eq!(places, [-5, -4, -3, -2, -1]);
        }
    }
    // What a server leaves out comes in the recommender's order.
    const SHORT: &[u8] =
        b"{\"choices\": [{\"message\": {\"content\": \"{\\\"ranking\\\": [\\\"D\\\", \\\"Z\\\", \\\"D\\\"]}\"}}]}";
    let server = faulty_server(|_, _| Fault::Body(SHORT));
    let scores = all_answered(&Remote::new(spec(server.url()), Reading::Generate).unwrap(), asks(1));
    // D, then B (1), C (2), A (3), E (4) of the places [3, 1, 2, 5, 4].
    assert_eq!(scores[0], [[-4.0], [-2.0], [-3.0], [-1.0], [-5.0]].map(|s: [f32; 1]| s.to_vec()));
}

/// The spec of a llama.cpp server.
fn llama_spec(url: String) -> RemoteSpec {
    let mut spec = spec(url);
    (spec.timeout, spec.concurrency) = (Duration::from_secs(60), 2);
    spec.dialect = tailfuse::llm::remote::Dialect::LlamaCpp;
    spec.top_logprobs = 200;
    spec
}

#[test]
fn llama_cpp_ranks_as_we_do_and_loses_nobody() {
    let Some(gguf) = smollm2("llama_cpp_ranks_as_we_do_and_loses_nobody") else { return };
    let Some(server) = LlamaServer::start("llama_cpp_ranks_as_we_do_and_loses_nobody", &gguf) else { return };
    let asks = asks(4);
    let direct = Remote::new(llama_spec(format!("http://{}/v1", server.address)), Reading::Label).unwrap();
    let clean = all_answered(&direct, asks.clone());

    // The same through a proxy that breaks the first try of everything.
    let kinds = [
        Fault::Slow(50),
        Fault::Status(429, Some("0.01")),
        Fault::Status(500, None),
        Fault::Truncated,
        Fault::Reset,
        Fault::Body(b"{"),
    ];
    let broken =
        proxy(server.address, move |number, before| if before == 0 { kinds[number % 6].clone() } else { Fault::Pass });
    let remote = Remote::new(llama_spec(broken.url()), Reading::Label).unwrap();
    let scores = all_answered(&remote, asks.clone());
    for (a, b) in clean.iter().flatten().zip(scores.iter().flatten()) {
        // Its batches differ, and with them its rounding.
        assert!((a[0] - b[0]).abs() < 0.5, "{a:?} {b:?}");
    }

    // The same weights here: llama.cpp quantizes activations, so it is near and not equal.
    let llm = Llm::open(&gguf, tailfuse::device::DeviceChoice::Cpu).unwrap();
    let ids: Vec<Vec<u32>> = asks
        .iter()
        .map(|a| llm.chat().encode_chat(&[tailfuse::llm::Message::new("user", a.user.as_str())]).unwrap())
        .collect();
    let letters: Vec<u32> = ('A'..='E').map(|l| llm.chat().encode_text(&l.to_string())[0]).collect();
    let labels = vec![letters; ids.len()];
    let ours = llm.label_logprobs(&ids, &labels, &mut |_| Ok(())).unwrap();
    let (mut worst, mut agree) = (0f32, 0);
    for (theirs, ours) in clean.iter().zip(&ours) {
        for (a, b) in theirs.iter().zip(ours) {
            worst = worst.max((a[0] - b).abs());
        }
        let best = |v: &[f32]| (0..v.len()).max_by(|a, b| v[*a].total_cmp(&v[*b]));
        agree += usize::from(best(ours) == best(&theirs.iter().map(|s| s[0]).collect::<Vec<_>>()));
    }
    assert!(worst < 1.5 && agree >= 2, "off by {worst}, the same first in {agree} of 4");

    // A list by a schema: whatever the model would like to say, these are the candidates.
    let remote = Remote::new(llama_spec(broken.url()), Reading::Generate).unwrap();
    for scores in all_answered(&remote, asks[..2].to_vec()) {
        let mut places: Vec<i64> = scores.iter().map(|s| s[0] as i64).collect();
        places.sort_unstable();
        assert_eq!(places, [-5, -4, -3, -2, -1]);
    }
    // And likelihood is refused by what the server answers, where the config did not say what it is.
    let mut plain = llama_spec(broken.url());
    plain.dialect = tailfuse::llm::remote::Dialect::Openai;
    let with_chat = asks.into_iter().map(|a| Ask { chat: Some(a.user.clone()), ..a }).take(1).collect();
    let (end, _) = ask_all(&Remote::new(plain, Reading::Likelihood).unwrap(), with_chat);
    let error = end.unwrap_err();
    assert!(error.fault.exit_code() == 78 && error.to_string().contains("likelihood"), "{error}");
}
