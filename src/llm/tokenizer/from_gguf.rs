//! The tokenizer that the metadata of a GGUF file describes.
//!
//! In: the `tokenizer.ggml.*` keys. Out: a byte-level BPE as a `tokenizer.json`, or SentencePiece's pieces.
//! The pre-tokenizers of GGUF files are named, not described; the regular expressions behind
//! the names are facts of llama.cpp's `src/llama-vocab.cpp` and of the models' own `tokenizer.json`.
//!
//! A pre-tokenizer is one line of [`PRE_TOKENIZERS`].

use std::collections::HashMap;

use serde_json::{Value as Json, json};

use super::spm::{Kind, Pieces};
use crate::error::{Error, Result};
use crate::llm::gguf::Gguf;

/// A pre-tokenizer of byte-level BPE.
struct PreTokenizer {
    /// Its names in GGUF files.
    names: &'static [&'static str],
    /// Cuts before GPT-2's bytes: `None` for GPT-2's own pattern.
    pattern: Option<&'static str>,
    /// Whether every digit (all of Unicode N*) is alone before that.
    digits: bool,
    /// Whether text is composed (NFC) first.
    compose: bool,
    /// Whether a word that is in the vocabulary is not merged up from its bytes.
    ignore_merges: bool,
    /// Whether the model begins texts with its BOS where the file does not say.
    adds_bos: bool,
}

/// What can be rebuilt, in the order in which messages name it.
const PRE_TOKENIZERS: &[PreTokenizer] = &[
    PreTokenizer { names: &["smollm"], digits: true, ..GPT2 },
    PreTokenizer { names: &["gpt-2", "gpt2", "default"], ..GPT2 },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3"],
        pattern: Some(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        ignore_merges: true,
        adds_bos: true,
        ..GPT2
    },
    PreTokenizer {
        names: &["qwen2"],
        pattern: Some(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        compose: true,
        ..GPT2
    },
];

const GPT2: PreTokenizer =
    PreTokenizer { names: &[], pattern: None, digits: false, compose: false, ignore_merges: false, adds_bos: false };

/// What a file describes.
pub enum Described {
    /// A `tokenizer.json`.
    Bpe(Json),
    /// SentencePiece's pieces.
    Pieces(Pieces),
}

/// Reads the description; the second value is whether the model begins texts with its BOS.
///
/// # Errors
/// Exit 65 where its kind is not supported, or its parts contradict each other.
pub fn describe(gguf: &Gguf) -> Result<(Described, bool)> {
    let tokens = gguf.texts("tokenizer.ggml.tokens")?;
    let types = gguf.numbers_opt("tokenizer.ggml.token_type")?.unwrap_or_default();
    if !types.is_empty() && types.len() != tokens.len() {
        return Err(gguf.fault(format!("{} tokens have {} token types", tokens.len(), types.len())));
    }
    let adds_bos = gguf.truth_opt("tokenizer.ggml.add_bos_token")?;
    match gguf.text("tokenizer.ggml.model")? {
        "gpt2" => {
            let pre = match gguf.get("tokenizer.ggml.pre") {
                None => "default",
                Some(_) => gguf.text("tokenizer.ggml.pre")?,
            };
            let pre = PRE_TOKENIZERS.iter().find(|p| p.names.contains(&pre)).ok_or_else(|| {
                let names: Vec<&str> = PRE_TOKENIZERS.iter().flat_map(|p| p.names).copied().collect();
                elsewhere(gguf, format!("the pre-tokenizer `{pre}` is not supported ({} are)", names.join(", ")))
            })?;
            Ok((Described::Bpe(bpe(gguf, pre, &tokens, &types)?), adds_bos.unwrap_or(pre.adds_bos)))
        }
        "llama" => {
            let scores = gguf.numbers_opt("tokenizer.ggml.scores")?;
            let scores = scores.ok_or_else(|| gguf.fault("the metadata key `tokenizer.ggml.scores` is missing"))?;
            let kind = |t: f64| Kind::from_id(t).ok_or_else(|| gguf.fault(format!("the token type {t} is unknown")));
            let kinds = if types.is_empty() {
                vec![Kind::Normal; tokens.len()]
            } else {
                types.into_iter().map(kind).collect::<Result<_>>()?
            };
            let prefix = gguf.truth_opt("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
            let texts = tokens.into_iter().map(str::to_owned).collect();
            let pieces = Pieces::new(texts, kinds, scores.into_iter().map(|s| s as f32).collect(), prefix)
                .map_err(|what| gguf.fault(what))?;
            Ok((Described::Pieces(pieces), adds_bos.unwrap_or(true)))
        }
        other => Err(elsewhere(
            gguf,
            format!(
                "the tokenizer `{other}` is not supported (`gpt2`, byte-level BPE, and `llama`, SentencePiece, are)"
            ),
        )),
    }
}

/// The error for what only the Hugging Face folder has.
fn elsewhere(gguf: &Gguf, what: String) -> Error {
    gguf.fault(what).with_help("use the model's Hugging Face folder, whose tokenizer.json is read whole")
}

/// A `tokenizer.json` of byte-level BPE.
fn bpe(gguf: &Gguf, pre: &PreTokenizer, tokens: &[&str], types: &[f64]) -> Result<Json> {
    let merges: Vec<(&str, &str)> = gguf
        .texts("tokenizer.ggml.merges")?
        .into_iter()
        .map(|m| m.split_once(' ').ok_or_else(|| gguf.fault(format!("the merge `{m}` is not a pair"))))
        .collect::<Result<_>>()?;
    let vocab: HashMap<&str, usize> = tokens.iter().enumerate().map(|(i, t)| (*t, i)).collect();
    if vocab.len() != tokens.len() {
        return Err(gguf.fault("two entries of `tokenizer.ggml.tokens` are the same"));
    }
    // Control and user-defined tokens are matched as a whole.
    let whole = types.iter().enumerate().filter_map(|(i, t)| match Kind::from_id(*t) {
        Some(kind @ (Kind::Control | Kind::UserDefined)) => Some((i, kind == Kind::Control)),
        _ => None,
    });
    let added: Vec<Json> = whole
        .map(|(i, special)| {
            json!({"id": i, "content": tokens[i], "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": special})
        })
        .collect();
    let mut steps = Vec::new();
    if pre.digits {
        steps.push(json!({"type": "Digits", "individual_digits": true}));
    }
    if let Some(pattern) = pre.pattern {
        steps.push(json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}));
    }
    let own_pattern = pre.pattern.is_none();
    steps.push(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": own_pattern}));
    let normalizer = if pre.compose { json!({"type": "NFC"}) } else { Json::Null };
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "ignore_merges": pre.ignore_merges, "vocab": vocab, "merges": merges},
    }))
}
