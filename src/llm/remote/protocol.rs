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
        Failure::Unsupported("the server gives no log-probabilities with its answers, which mode = \"label\" needs".into())
    })?;
    let top = first.get("top_logprobs").and_then(Value::as_array).filter(|t| !t.is_empty());
    let shown = top.map_or_else(|| std::slice::from_ref(first), Vec::as_slice);
    let mut scores = vec![f64::NEG_INFINITY; letters.len()];
    let mut least = f64::INFINITY;
    for token in shown {
        let Some(logprob) = token.get("logprob").and_then(Value::as_f64).filter(|p| p.is_finite() && *p <= 1e-3) else {
            continue;
        };
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
            (own.get("logprob").and_then(Value::as_f64), own.get("decoded_token").and_then(Value::as_str))
        else {
            break;
        };
        logprobs.push(logprob.max(f64::from(f32::MIN)) as f32);
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
            let logprob = logprob.as_f64().ok_or_else(|| Failure::Unparsable("a token has no log-probability".into()))?;
            found.push(logprob.max(f64::from(f32::MIN)) as f32);
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
            _ => json!({ "type": "json_schema", "json_schema": { "name": "ranking", "strict": true, "schema": schema } }),
        };
        body.insert("response_format".into(), format);
    }
    Value::Object(body)
}

/// The text of an answer and the order that it names, completed by the recommender's `places` (as shown).
///
/// # Errors
/// `Unparsable` where it names too little.
pub fn read_order(answer: &Value, titles: &[String], letters: bool, places: &[u32]) -> Result<(String, Vec<usize>), Failure> {
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

fn choice(answer: &Value) -> Result<&Value, Failure> {
    answer.pointer("/choices/0").ok_or_else(|| Failure::Unparsable("the answer has no `choices`".into()))
}
