//! The OpenAI protocol: requests for each mode, and what is read from the answers.
//!
//! In: a prompt and its candidates. Out: JSON bodies; scores from JSON answers, or the [`Failure`] of answers that are
//! none. Pure functions of JSON: whatever a server sends, no panic, and one score per candidate or none at all.
//! Where a form differs between servers, it is the one of vLLM's, llama.cpp's and TGI's own documentation.

use serde_json::{Map, Value, json};

use super::client::Failure;
use super::config::{Dialect, RemoteSpec, Structured};
use super::reading;
use crate::error::{Error, Result};

/// How an answer is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// Log-probabilities of the candidates' letters as the first token of the answer.
    Label,
    /// Log-probabilities of the tokens of each candidate's title.
    Likelihood,
    /// The order that the answer's text names.
    Generate,
}

/// Raise it when requests change so that another answer may come: it is part of the ledger's keys.
pub const VERSION: u32 = 1;

/// Whether a server that speaks a dialect can answer in a mode.
///
/// # Errors
/// Exit 78, with what to do instead.
pub fn check(dialect: Dialect, reading: Reading) -> Result<()> {
    match (dialect, reading) {
        (Dialect::LlamaCpp | Dialect::Tgi, Reading::Likelihood) => {
            Err(Error::spec("mode = \"likelihood\" needs the log-probabilities of a prompt's own tokens, and neither llama.cpp's server nor TGI gives them")
                .with_help("use mode = \"label\" or \"generate\", a vLLM server, or engine.kind = \"local\""))
        }
        _ => Ok(()),
    }
}

fn messages(system: &str, user: &str) -> Vec<Value> {
    let mut messages = Vec::new();
    if !system.is_empty() {
        messages.push(json!({ "role": "system", "content": system }));
    }
    messages.push(json!({ "role": "user", "content": user }));
    messages
}

/// A greedy chat.
fn chat(spec: &RemoteSpec, messages: Vec<Value>, max_tokens: u32) -> Map<String, Value> {
    let mut body = Map::new();
    body.insert("model".into(), json!(spec.model));
    body.insert("messages".into(), Value::Array(messages));
    body.insert("temperature".into(), json!(0));
    body.insert("max_tokens".into(), json!(max_tokens));
    body
}

/// Mode `label`: one token, with the likeliest ones beside it.
pub fn label_body(spec: &RemoteSpec, system: &str, user: &str) -> Value {
    let mut body = chat(spec, messages(system, user), 1);
    body.insert("logprobs".into(), json!(true));
    body.insert("top_logprobs".into(), json!(spec.top_logprobs));
    Value::Object(body)
}

/// Log-probabilities of the candidates' `letters`, natural logarithms. Different tokens of the same letter (with a
/// space before it, say) are added up. A letter that is not among the tokens that the server shows gets one less than
/// the least likely of those: it cannot be likelier than that.
///
/// # Errors
/// `Unsupported` without log-probabilities, `Unparsable` where none of the letters is among the tokens.
pub fn read_labels(answer: &Value, letters: &[char]) -> Result<Vec<f32>, Failure> {
    let choice = choice(answer)?;
    let tokens = choice.pointer("/logprobs/content").and_then(Value::as_array);
    let first = tokens.and_then(|t| t.first()).ok_or_else(|| {
        Failure::Unsupported(
            "the server gives no log-probabilities with its answers, which mode = \"label\" needs".into(),
        )
    })?;
    let top = first.get("top_logprobs").and_then(Value::as_array).filter(|t| !t.is_empty());
    let shown = top.map_or_else(|| std::slice::from_ref(first), Vec::as_slice);
    let mut scores = vec![f64::NEG_INFINITY; letters.len()];
    let mut least = f64::INFINITY;
    for token in shown {
        let Some(logprob) = token.get("logprob").and_then(logarithm) else { continue };
        least = least.min(logprob);
        let text = token.get("token").and_then(Value::as_str).unwrap_or_default();
        let letter = text.trim_matches(|c: char| c.is_whitespace() || matches!(c, '▁' | 'Ġ'));
        let mut characters = letter.chars();
        let place = match (characters.next(), characters.next()) {
            (Some(only), None) => letters.iter().position(|l| *l == only),
            _ => None,
        };
        if let Some(place) = place {
            let (a, b) = (scores[place].max(logprob), scores[place].min(logprob));
            scores[place] = a + (b - a).exp().ln_1p();
        }
    }
    if scores.iter().all(|s| *s == f64::NEG_INFINITY) {
        return Err(Failure::Unparsable("no candidate's letter is among the likeliest tokens".into()));
    }
    Ok(scores.into_iter().map(|s| if s == f64::NEG_INFINITY { least - 1.0 } else { s } as f32).collect())
}

/// Mode `likelihood` on vLLM: the title as the beginning of the answer, and the log-probabilities of all that was sent.
pub fn prompt_logprobs_body(spec: &RemoteSpec, system: &str, user: &str, title: &str) -> Value {
    let mut messages = messages(system, user);
    messages.push(json!({ "role": "assistant", "content": title }));
    let mut body = chat(spec, messages, 1);
    body.insert("prompt_logprobs".into(), json!(0));
    body.insert("add_generation_prompt".into(), json!(false));
    body.insert("continue_final_message".into(), json!(true));
    Value::Object(body)
}

/// Log-probabilities of the tokens at the end of the prompt that spell `title`, first token first.
///
/// # Errors
/// `Unsupported` without log-probabilities, `Unparsable` where the end of the prompt does not spell the title.
pub fn read_prompt_logprobs(answer: &Value, title: &str) -> Result<Vec<f32>, Failure> {
    let tokens = answer
        .get("prompt_logprobs")
        .or_else(|| answer.pointer("/choices/0/prompt_logprobs"))
        .and_then(Value::as_array)
        .ok_or_else(|| {
            Failure::Unsupported("the server gives no log-probabilities of the prompt (`prompt_logprobs`), which mode = \"likelihood\" needs".into())
        })?;
    let mut logprobs = Vec::new();
    let mut text = String::new();
    for token in tokens.iter().rev() {
        // With `prompt_logprobs = 0` a position holds its own token only; else the one that was sent comes first.
        let Some(own) = token.as_object().and_then(|o| o.values().next()) else { break };
        let (Some(logprob), Some(decoded)) =
            (own.get("logprob").and_then(logarithm), own.get("decoded_token").and_then(Value::as_str))
        else {
            break;
        };
        logprobs.push(logprob as f32);
        text.insert_str(0, decoded);
        // A token may begin before the title (with a space) and belongs to it then.
        if text.trim_start().len() >= title.len() || logprobs.len() > 4096 {
            break;
        }
    }
    if !text.ends_with(title) || logprobs.is_empty() {
        return Err(Failure::Unparsable("the last tokens of the prompt do not spell the title".into()));
    }
    logprobs.reverse();
    Ok(logprobs)
}

/// Mode `likelihood` by `echo`: a completion that repeats its prompt with log-probabilities. `prompt` is the whole chat.
pub fn echo_body(spec: &RemoteSpec, prompt: &str, title: &str) -> Value {
    json!({
        "model": spec.model, "prompt": format!("{prompt}{title}"), "temperature": 0, "max_tokens": 1, "echo": true,
        "logprobs": 1,
    })
}

/// Log-probabilities of the echoed tokens of `title`, which follows `prompt`.
///
/// # Errors
/// As [`read_prompt_logprobs`].
pub fn read_echo(answer: &Value, prompt: &str, title: &str) -> Result<Vec<f32>, Failure> {
    let choice = choice(answer)?;
    let list = |key: &str| choice.pointer(&format!("/logprobs/{key}")).and_then(Value::as_array);
    let (Some(logprobs), Some(offsets)) = (list("token_logprobs"), list("text_offset")) else {
        return Err(Failure::Unsupported(
            "the server does not echo a prompt with log-probabilities, which mode = \"likelihood\" needs".into(),
        ));
    };
    let (from, to) = (prompt.chars().count() as u64, (prompt.chars().count() + title.chars().count()) as u64);
    let mut found = Vec::new();
    for (token, logprob) in logprobs.iter().enumerate() {
        let Some(begin) = offsets.get(token).and_then(Value::as_u64) else { break };
        let end = offsets.get(token + 1).and_then(Value::as_u64).unwrap_or(to.max(begin + 1));
        if end > from && begin < to {
            let logprob =
                logarithm(logprob).ok_or_else(|| Failure::Unparsable("a token has no log-probability".into()))?;
            found.push(logprob as f32);
        }
    }
    if found.is_empty() {
        return Err(Failure::Unsupported(
            "the server echoes no prompt, and mode = \"likelihood\" needs its log-probabilities".into(),
        ));
    }
    Ok(found)
}

/// Mode `generate`: the whole order, by `letters` where the prompt has them, else by titles.
pub fn generate_body(spec: &RemoteSpec, system: &str, user: &str, titles: &[String], letters: &[char]) -> Value {
    let n = titles.len();
    let lettered = !letters.is_empty();
    let names: Vec<String> = match lettered {
        true => letters.iter().map(char::to_string).collect(),
        false => {
            let mut seen = std::collections::HashSet::new();
            titles.iter().filter(|t| seen.insert(t.as_str())).cloned().collect()
        }
    };
    let what = if lettered { "the letters" } else { "the exact titles" };
    let wanted = match spec.structured {
        Structured::JsonSchema => format!(
            "{user}\n\nAnswer with JSON: {{\"ranking\": [...]}}, {what} of all {n} candidates, the likeliest first, each once."
        ),
        Structured::Text => format!(
            "{user}\n\nAnswer with {what} of all {n} candidates, the likeliest first, each once, one on each line and nothing else."
        ),
    };
    let longest = if lettered { 8 } else { 16 + titles.iter().map(|t| t.len()).max().unwrap_or(0) as u32 / 2 };
    let max_tokens = spec.max_tokens.unwrap_or(32 + longest * n as u32);
    let mut body = chat(spec, messages(system, &wanted), max_tokens);
    if spec.structured == Structured::JsonSchema {
        let items = json!({ "type": "string", "enum": names });
        let schema = json!({
            "type": "object",
            "properties": { "ranking": { "type": "array", "items": items, "minItems": n, "maxItems": n } },
            "required": ["ranking"],
            "additionalProperties": false,
        });
        let format = match spec.dialect {
            Dialect::Tgi => json!({ "type": "json", "value": schema }),
            _ => {
                json!({ "type": "json_schema", "json_schema": { "name": "ranking", "strict": true, "schema": schema } })
            }
        };
        body.insert("response_format".into(), format);
    }
    Value::Object(body)
}

/// The text of an answer and the order that it names, completed by the recommender's `places` (as shown).
///
/// # Errors
/// `Unparsable` where it names too little.
pub fn read_order(
    answer: &Value,
    titles: &[String],
    letters: bool,
    places: &[u32],
) -> Result<(String, Vec<usize>), Failure> {
    let text = text(answer)?;
    let named = reading::order(text, titles, letters)
        .ok_or_else(|| Failure::Unparsable("the text names too few of the candidates".into()))?;
    Ok((text.to_owned(), reading::complete(&named, places)))
}

/// The text of a chat's answer.
fn text(answer: &Value) -> Result<&str, Failure> {
    choice(answer)?
        .pointer("/message/content")
        .and_then(Value::as_str)
        .ok_or_else(|| Failure::Unparsable("the answer has no text".into()))
}

/// A log-probability: not above 0, and not so far below that a sum of them has no number.
fn logarithm(value: &Value) -> Option<f64> {
    value.as_f64().map(|p| p.clamp(-1e9, 0.0))
}

fn choice(answer: &Value) -> Result<&Value, Failure> {
    answer.pointer("/choices/0").ok_or_else(|| Failure::Unparsable("the answer has no `choices`".into()))
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::config::{EngineConfig, EngineKind};
    use super::*;

    fn spec(dialect: Dialect) -> RemoteSpec {
        let (kind, url, model) = (EngineKind::Openai, Some("http://x/v1".into()), Some("m".into()));
        let config = EngineConfig { kind, url, model, dialect: Some(dialect), ..EngineConfig::default() };
        config.resolve().unwrap().unwrap()
    }

    /// As llama.cpp's server answered "A. Alien, B. Brazil": shortened, and with a token of another form of the letter B.
    const LABELS: &str = r#"{"choices":[{"finish_reason":"length","index":0,"message":{"role":"assistant","content":"A"},
        "logprobs":{"content":[{"id":49,"token":"A","bytes":[65],"logprob":-0.88036,"top_logprobs":[
        {"id":49,"token":"A","bytes":[65],"logprob":-0.88036},{"id":50,"token":"B","bytes":[66],"logprob":-2.8386},
        {"id":329,"token":" B","bytes":[32,66],"logprob":-4.0},{"id":504,"token":"The","bytes":[84,104,101],"logprob":-3.27896}]}]}}],
        "usage":{"completion_tokens":1,"prompt_tokens":47,"total_tokens":48}}"#;
    /// As it answered with a schema.
    const ORDER: &str = r#"{"choices":[{"finish_reason":"stop","index":0,"message":{"role":"assistant",
        "content":"{\n  \"ranking\": [\n    \"B\",\n    \"A\"\n  ]\n}"}}],"usage":{"completion_tokens":21,"prompt_tokens":43}}"#;
    /// As vLLM documents `prompt_logprobs`: one object per token of the prompt, the first one null.
    const PROMPT: &str = r#"{"choices":[{"index":0,"message":{"role":"assistant","content":"."}}],"prompt_logprobs":[null,
        {"1":{"logprob":-5.5,"rank":9,"decoded_token":"\n"}},{"2":{"logprob":-1.5,"rank":1,"decoded_token":"Al"}},
        {"3":{"logprob":-0.25,"rank":1,"decoded_token":"ien"}}]}"#;
    /// As completions echo "Pick: " + "Alien" with one more token.
    const ECHO: &str = r#"{"choices":[{"text":"Pick: Alien.","index":0,"logprobs":{"tokens":["Pick",":"," Al","ien","."],
        "token_logprobs":[null,-3.0,-1.5,-0.25,-0.1],"text_offset":[0,4,5,8,11],"top_logprobs":[]}}]}"#;

    fn json(text: &str) -> Value {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn letters_are_read_from_the_likeliest_tokens() {
        let scores = read_labels(&json(LABELS), &['A', 'B', 'C']).unwrap();
        assert!((scores[0] + 0.88036).abs() < 1e-5);
        // Both forms of B: ln(exp(-2.8386) + exp(-4)).
        assert!((scores[1] - (f64::exp(-2.8386) + f64::exp(-4.0)).ln() as f32).abs() < 1e-5, "{scores:?}");
        // C is not among them: less likely than the least likely that is shown.
        assert_eq!(scores[2], -5.0);
        let absurd = LABELS.replace("-0.88036", "-3e96").replace("-2.8386", "5");
        let scores = read_labels(&json(&absurd), &['A', 'B', 'C']).unwrap();
        assert!(scores.iter().all(|s| s.is_finite()) && scores[1] > scores[0], "{scores:?}");
        assert_eq!(read_labels(&json(ORDER), &['A']).unwrap_err().reason(), "unsupported");
        assert_eq!(read_labels(&json(LABELS), &['X', 'Y']).unwrap_err().reason(), "unparsable");
        assert_eq!(read_labels(&json("{}"), &['X']).unwrap_err().reason(), "unparsable");
    }

    #[test]
    fn titles_are_read_from_the_prompts_own_tokens() {
        assert_eq!(read_prompt_logprobs(&json(PROMPT), "Alien").unwrap(), [-1.5, -0.25]);
        assert_eq!(read_prompt_logprobs(&json(PROMPT), "Brazil").unwrap_err().reason(), "unparsable");
        assert_eq!(read_prompt_logprobs(&json(LABELS), "Alien").unwrap_err().reason(), "unsupported");
        // The token " Al" begins before the title.
        assert_eq!(read_echo(&json(ECHO), "Pick: ", "Alien").unwrap(), [-1.5, -0.25]);
        assert_eq!(read_echo(&json(ECHO), "Pick:", " Alien.").unwrap(), [-1.5, -0.25, -0.1]);
        assert_eq!(read_echo(&json(LABELS), "Pick: ", "Alien").unwrap_err().reason(), "unsupported");
    }

    #[test]
    fn orders_are_read_from_the_text() {
        let titles = ["Alien".to_owned(), "Brazil".to_owned(), "Clue".to_owned()];
        let (text, order) = read_order(&json(ORDER), &titles, true, &[1, 2, 3]).unwrap();
        assert!(text.contains("ranking"));
        assert_eq!(order, [1, 0, 2]);
        assert_eq!(
            read_order(&json("{\"choices\":[{\"message\":{\"content\":null}}]}"), &titles, true, &[1, 2, 3])
                .unwrap_err()
                .reason(),
            "unparsable"
        );
    }

    #[test]
    fn requests_have_the_form_that_each_server_reads() {
        let titles = ["Alien".to_owned(), "Brazil".to_owned(), "Alien".to_owned()];
        let body = generate_body(&spec(Dialect::Openai), "S", "U", &titles, &[]);
        let items = body.pointer("/response_format/json_schema/schema/properties/ranking/items/enum").unwrap();
        assert_eq!(*items, json!(["Alien", "Brazil"]));
        assert_eq!(body.pointer("/messages/0/role").unwrap(), "system");
        let body = generate_body(&spec(Dialect::Tgi), "", "U", &titles, &['A', 'B', 'C']);
        assert_eq!(
            body.pointer("/response_format/value/properties/ranking/items/enum").unwrap(),
            &json!(["A", "B", "C"])
        );
        assert_eq!(body["messages"].as_array().unwrap().len(), 1);
        let text = RemoteSpec { structured: Structured::Text, ..spec(Dialect::Openai) };
        assert!(generate_body(&text, "", "U", &titles, &[]).get("response_format").is_none());
        let body = label_body(&spec(Dialect::Openai), "S", "U");
        assert_eq!(
            (&body["max_tokens"], &body["top_logprobs"], &body["logprobs"]),
            (&json!(1), &json!(20), &json!(true))
        );
        let body = prompt_logprobs_body(&spec(Dialect::Vllm), "S", "U", "Alien");
        assert_eq!(body.pointer("/messages/2").unwrap(), &json!({ "role": "assistant", "content": "Alien" }));
        assert_eq!(body["add_generation_prompt"], false);
        assert_eq!(echo_body(&spec(Dialect::Openai), "P: ", "Alien")["prompt"], "P: Alien");
    }

    /// Bytes of a good answer with something done to them.
    fn mutated(rng: &mut ChaCha8Rng, base: &str) -> Vec<u8> {
        const WORDS: [&str; 24] = [
            "null",
            "\"\"",
            "[]",
            "{}",
            "1e999",
            "-1e400",
            "-0",
            "true",
            "\"logprob\":",
            "\"A\"",
            "\"\\ud800\"",
            "[[[[",
            "}}",
            ",",
            "\\u0000",
            "999999999999999999999",
            "\"content\":",
            "\"Aliens\"",
            "\u{202e}",
            "NaN",
            "\"top_logprobs\":[",
            "\n",
            "\"text_offset\":",
            "-3",
        ];
        let mut bytes = base.as_bytes().to_vec();
        for _ in 0..rng.random_range(1..=6) {
            let at = rng.random_range(0..=bytes.len());
            let end = (at + rng.random_range(0..24usize)).min(bytes.len());
            match rng.random_range(0..7) {
                0 => bytes.truncate(at),
                1 => bytes.splice(at..at, WORDS[rng.random_range(0..WORDS.len())].bytes()).for_each(drop),
                2 => bytes.splice(at..end, WORDS[rng.random_range(0..WORDS.len())].bytes()).for_each(drop),
                3 => bytes.drain(at..end).for_each(drop),
                4 => {
                    let piece = bytes[at..end].to_vec();
                    let to = rng.random_range(0..=bytes.len());
                    bytes.splice(to..to, piece).for_each(drop);
                }
                5 if at < bytes.len() => bytes[at] = rng.random(),
                _ => {
                    // A number of another size, in its place.
                    if let Some(digit) = bytes[at.min(bytes.len())..].iter().position(u8::is_ascii_digit) {
                        let digit = at + digit;
                        bytes.splice(digit..=digit, WORDS[rng.random_range(4..16)].bytes()).for_each(drop);
                    }
                }
            }
        }
        bytes
    }

    /// Any bytes in: no panic, one finite score per candidate or none, an order of exactly the candidates or none.
    /// `TAILFUSE_FUZZ` sets how many; see the recipe `fuzz`.
    #[test]
    fn fuzz_remote_answers() {
        let inputs: u64 = std::env::var("TAILFUSE_FUZZ").ok().and_then(|n| n.parse().ok()).unwrap_or(3000);
        let mut rng = ChaCha8Rng::seed_from_u64(20_241);
        let titles = ["Alien", "Aliens", "Brazil (1985)", "A. B", "1984"].map(str::to_owned);
        let (letters, places) = (['A', 'B', 'C', 'D', 'E'], [2u32, 1, 5, 4, 3]);
        let mut read = [0u64; 4];
        for n in 0..inputs {
            let base = [LABELS, ORDER, PROMPT, ECHO][(n % 4) as usize];
            let bytes = mutated(&mut rng, base);
            // As text, whatever the protocol around it.
            let text = String::from_utf8_lossy(&bytes);
            if let Some(order) = reading::order(&text, &titles, n % 8 < 4) {
                let all = reading::complete(&order, &places);
                let mut sorted = all.clone();
                sorted.sort_unstable();
                assert_eq!(sorted, [0, 1, 2, 3, 4], "{text}");
                assert!(order.len() <= 5 && all.starts_with(&order));
            }
            let Ok(answer) = serde_json::from_slice::<Value>(&bytes) else { continue };
            if let Ok(scores) = read_labels(&answer, &letters) {
                assert!(scores.len() == 5 && scores.iter().all(|s| s.is_finite()), "{text}: {scores:?}");
                read[0] += 1;
            }
            if let Ok((_, order)) = read_order(&answer, &titles, n % 8 < 4, &places) {
                let mut sorted = order;
                sorted.sort_unstable();
                assert_eq!(sorted, [0, 1, 2, 3, 4], "{text}");
                read[1] += 1;
            }
            if let Ok(scores) = read_prompt_logprobs(&answer, "Alien") {
                assert!(!scores.is_empty() && scores.iter().all(|s| s.is_finite()), "{text}");
                read[2] += 1;
            }
            if let Ok(scores) = read_echo(&answer, "Pick: ", "Alien") {
                assert!(!scores.is_empty() && scores.iter().all(|s| s.is_finite()), "{text}");
                read[3] += 1;
            }
        }
        // The mutations leave enough whole that each reader is reached.
        assert!(read.iter().all(|n| *n > inputs / 400), "{read:?}");
    }
}
