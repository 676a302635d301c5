//! `tailfuse llm`: one JSON request per line in, one JSON answer per line out.
//!
//! For people who check or debug a model. A request that cannot be served is answered with
//! `{"error": ..}`, and the next one is served.
//!
//! | request | answer |
//! | --- | --- |
//! | `{"op":"tokenize","text":..,"special":true}` | `{"ids":[..]}`; with `"special":false` special tokens are plain text |
//! | `{"op":"decode","ids":[..],"skip_special":false}` | `{"text":..}` |
//! | `{"op":"chat","messages":[{"role":..,"content":..}],"add_generation_prompt":true}` | `{"ids":[..],"text":..}` |
//! | `{"op":"logits","ids":[..],"top":20,"probe":[ids]}` | `{"top":[[id,logit],..],"probe":[[id,logit],..],"mean":..,"std":..,"logsumexp":..}` of the last position |
//! | `{"op":"score","ids":[..],"continuations":[[ids],..]}` | `{"logprobs":[[per token],..],"sums":[..]}` |
//! | `{"op":"generate","ids":[..],"max_new":32,"stop_at_end":false}` | `{"ids":[..],"text":..}`, greedy |
//! | `{"op":"labels","ids":[..],"labels":[ids],"among":false}` | `{"logprobs":[..]}` of one-token labels, over the vocabulary or among the labels |
//! | `{"op":"rank","ids":[..],"titles":[..],"numbered":false}` | `{"order":[..],"logprobs":[..]}`: the list that is written greedily, candidates only; `"candidates":[[ids],..]` in place of `"titles"` |
//! | `{"op":"rate","ids":[..],"ratings":[1,2,3,4,5]}` | `{"expected":..,"greedy":..,"probabilities":[..]}`; a rating may be `[value,[ids]]` |
//! | `{"op":"hidden","ids":[..]}` | `{"mean":[..]}` of the final hidden states |
//! | `{"op":"memory"}` | `{"weights":..,"kv":..,"pass":..,"total":..}`, bytes at most |
//!
//! Where `"ids"` are taken, `"text"` (special tokens parsed) may stand in their place.

use std::io::{BufRead, Write};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value as Json, json};

use super::Llm;
use super::chat::Message;
use super::engine::ScoreRequest;
use super::ranking::{ListFormat, RankRequest};
use super::rating::RatingScale;
use super::scoring;
use crate::error::{Error, Result};

/// The operations, for messages.
const OPERATIONS: &str = "tokenize, decode, chat, logits, score, generate, labels, rank, rate, hidden, memory";

/// Answers requests until the input ends.
///
/// # Errors
/// Exit 75 where the input cannot be read or an answer cannot be written; never for a bad request.
pub fn serve(llm: &Llm, mut input: impl BufRead, mut output: impl Write) -> Result<()> {
    let mut line = Vec::new();
    loop {
        line.clear();
        let n =
            input.read_until(b'\n', &mut line).map_err(|e| Error::environment("cannot read a request").because(e))?;
        if n == 0 {
            return Ok(());
        }
        let answer = answer(llm, &line).unwrap_or_else(|e| json!({"error": e.to_string()}));
        writeln!(output, "{answer}")
            .and_then(|()| output.flush())
            .map_err(|e| Error::environment("cannot write an answer").because(e))?;
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tokenize {
    text: String,
    #[serde(default = "yes")]
    special: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Decode {
    ids: Vec<u32>,
    #[serde(default)]
    skip_special: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Chat {
    messages: Vec<Message>,
    #[serde(default = "yes")]
    add_generation_prompt: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Logits {
    ids: Option<Vec<u32>>,
    text: Option<String>,
    #[serde(default = "twenty")]
    top: usize,
    #[serde(default)]
    probe: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Score {
    ids: Option<Vec<u32>>,
    text: Option<String>,
    continuations: Vec<Vec<u32>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Generate {
    ids: Option<Vec<u32>>,
    text: Option<String>,
    #[serde(default = "thirty_two")]
    max_new: usize,
    #[serde(default)]
    stop_at_end: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Labels {
    ids: Option<Vec<u32>>,
    text: Option<String>,
    labels: Vec<u32>,
    #[serde(default)]
    among: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rank {
    ids: Option<Vec<u32>>,
    text: Option<String>,
    titles: Option<Vec<String>>,
    candidates: Option<Vec<Vec<u32>>>,
    #[serde(default)]
    numbered: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rate {
    ids: Option<Vec<u32>>,
    text: Option<String>,
    ratings: Vec<Json>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Hidden {
    ids: Option<Vec<u32>>,
    text: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Memory {}

fn yes() -> bool {
    true
}

fn twenty() -> usize {
    20
}

fn thirty_two() -> usize {
    32
}

/// Answers one line.
fn answer(llm: &Llm, line: &[u8]) -> Result<Json> {
    let bad = |what: String| Error::data(what).with_help(format!("`op` is one of {OPERATIONS}"));
    let request: Json = serde_json::from_slice(line).map_err(|e| bad(format!("the line is not JSON: {e}")))?;
    let Json::Object(mut fields) = request else {
        return Err(bad("the line is not a JSON object".to_owned()));
    };
    let op = fields.remove("op").ok_or_else(|| bad("the request has no `op`".to_owned()))?;
    let op = op.as_str().ok_or_else(|| bad(format!("`op` is {op}, not text")))?.to_owned();
    match op.as_str() {
        "tokenize" => tokenize(llm, fields_of(&op, fields)?),
        "decode" => decode(llm, fields_of(&op, fields)?),
        "chat" => chat(llm, fields_of(&op, fields)?),
        "logits" => logits(llm, fields_of(&op, fields)?),
        "score" => score(llm, fields_of(&op, fields)?),
        "generate" => generate(llm, fields_of(&op, fields)?),
        "labels" => labels(llm, fields_of(&op, fields)?),
        "rank" => rank(llm, fields_of(&op, fields)?),
        "rate" => rate(llm, fields_of(&op, fields)?),
        "hidden" => hidden(llm, fields_of(&op, fields)?),
        "memory" => {
            let Memory {} = fields_of(&op, fields)?;
            let m = llm.memory();
            Ok(json!({"weights": m.weights, "kv": m.kv, "pass": m.pass, "total": m.total()}))
        }
        other => Err(bad(format!("the operation `{other}` is unknown"))),
    }
}

/// The fields of an operation.
fn fields_of<T: DeserializeOwned>(op: &str, fields: Map<String, Json>) -> Result<T> {
    serde_json::from_value(Json::Object(fields)).map_err(|e| Error::data(format!("`{op}`: {e}")))
}

/// The prompt of a request, as ids or as text.
fn prompt(llm: &Llm, ids: Option<Vec<u32>>, text: Option<String>) -> Result<Vec<u32>> {
    match (ids, text) {
        (Some(ids), None) => Ok(ids),
        (None, Some(text)) => Ok(llm.chat().tokenizer()?.encode_special(&text)),
        _ => Err(Error::data("give `ids` or `text`, one of the two")),
    }
}

fn tokenize(llm: &Llm, request: Tokenize) -> Result<Json> {
    let tokenizer = llm.chat().tokenizer()?;
    let ids =
        if request.special { tokenizer.encode_special(&request.text) } else { tokenizer.encode_text(&request.text) };
    Ok(json!({"ids": ids}))
}

fn decode(llm: &Llm, request: Decode) -> Result<Json> {
    let tokenizer = llm.chat().tokenizer()?;
    check_ids(llm, "ids", &request.ids)?;
    let text = if request.skip_special {
        tokenizer.decode_without_special(&request.ids)
    } else {
        tokenizer.decode(&request.ids)
    };
    Ok(json!({"text": text}))
}

fn chat(llm: &Llm, request: Chat) -> Result<Json> {
    let ids = llm.chat().encode_conversation(&request.messages, request.add_generation_prompt)?;
    let text = llm.chat().render(&request.messages, request.add_generation_prompt)?;
    Ok(json!({"ids": ids, "text": text}))
}

fn logits(llm: &Llm, request: Logits) -> Result<Json> {
    check_ids(llm, "probe", &request.probe)?;
    let ids = prompt(llm, request.ids, request.text)?;
    let row = llm.logits(&ids)?;
    let n = row.len() as f64;
    let mean = row.iter().map(|l| f64::from(*l)).sum::<f64>() / n;
    let variance = row.iter().map(|l| (f64::from(*l) - mean).powi(2)).sum::<f64>() / n;
    let probe: Vec<(u32, f32)> = request.probe.iter().map(|id| (*id, row[*id as usize])).collect();
    Ok(json!({
        "top": scoring::top(&row, request.top),
        "probe": probe,
        "mean": mean,
        "std": variance.sqrt(),
        "logsumexp": scoring::normalizer(&row),
    }))
}

fn score(llm: &Llm, request: Score) -> Result<Json> {
    let prompt = prompt(llm, request.ids, request.text)?;
    let requests = [ScoreRequest { prompt, continuations: request.continuations }];
    let logprobs = llm.continuation_logprobs(&requests, &mut |_| Ok(()))?.swap_remove(0);
    let sums: Vec<f64> = logprobs.iter().map(|l| scoring::sum(l)).collect();
    Ok(json!({"logprobs": logprobs, "sums": sums}))
}

fn generate(llm: &Llm, request: Generate) -> Result<Json> {
    let prompt = prompt(llm, request.ids, request.text)?;
    let stop = if request.stop_at_end { llm.chat().end_of_text() } else { &[] };
    let ids = llm.generate(&prompt, request.max_new, stop)?;
    let text = llm.chat().decode(&ids);
    Ok(json!({"ids": ids, "text": text}))
}

fn labels(llm: &Llm, request: Labels) -> Result<Json> {
    let (prompts, labels) = ([prompt(llm, request.ids, request.text)?], [request.labels]);
    let logprobs = if request.among {
        llm.label_logprobs_among(&prompts, &labels, &mut |_| Ok(()))?
    } else {
        llm.label_logprobs(&prompts, &labels, &mut |_| Ok(()))?
    };
    Ok(json!({"logprobs": logprobs[0]}))
}

fn rank(llm: &Llm, request: Rank) -> Result<Json> {
    let prompt = prompt(llm, request.ids, request.text)?;
    let request = match (request.titles, request.candidates) {
        (Some(titles), None) => {
            llm.chat().tokenizer()?;
            let titles: Vec<&str> = titles.iter().map(String::as_str).collect();
            let format = if request.numbered { ListFormat::Numbered } else { ListFormat::Lines };
            RankRequest::new(llm.chat(), prompt, &titles, format)
        }
        (None, Some(candidates)) => RankRequest { prompt, candidates, leads: Vec::new() },
        _ => return Err(Error::data("give `titles` or `candidates`, one of the two")),
    };
    let ranked = llm.rank_by_generation(&[request], &mut |_| Ok(()))?.swap_remove(0);
    Ok(json!({"order": ranked.order, "logprobs": ranked.logprobs}))
}

fn rate(llm: &Llm, request: Rate) -> Result<Json> {
    let prompts = [prompt(llm, request.ids, request.text)?];
    let numbers: Option<Vec<f64>> = request.ratings.iter().map(Json::as_f64).collect();
    let scale = match numbers {
        Some(values) => {
            llm.chat().tokenizer()?;
            RatingScale::new(llm.chat(), &values)?
        }
        None => {
            let rating = |r: &Json| serde_json::from_value::<(f64, Vec<u32>)>(r.clone());
            let ratings: std::result::Result<Vec<_>, _> = request.ratings.iter().map(rating).collect();
            let ratings = ratings.map_err(|e| Error::data(format!("a rating is a number or [value, [ids]]: {e}")))?;
            RatingScale::from_tokens(ratings, llm.chat().end_of_text())?
        }
    };
    Ok(json!(llm.rate(&prompts, &scale, &mut |_| Ok(()))?.swap_remove(0)))
}

fn hidden(llm: &Llm, request: Hidden) -> Result<Json> {
    let texts = [prompt(llm, request.ids, request.text)?];
    Ok(json!({"mean": llm.hidden_means(&texts, &mut |_| Ok(()))?[0]}))
}

/// Every id is of the vocabulary.
fn check_ids(llm: &Llm, what: &str, ids: &[u32]) -> Result<()> {
    let size = llm.chat().vocab_size();
    match ids.iter().find(|id| **id as usize >= size) {
        Some(id) => Err(Error::data(format!("`{what}` has {id}, which is not in the vocabulary (0 to {})", size - 1))),
        None => Ok(()),
    }
}
