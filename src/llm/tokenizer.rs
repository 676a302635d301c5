//! Text to token ids and back, exactly as the model was trained.
//!
//! In: a `tokenizer.json`, or the `tokenizer.ggml.*` metadata of a GGUF file. Out: [`Tokenizer`].
//! Special tokens in a text (`<|im_end|>`) are either parsed or taken as the characters they are
//! written with: item titles and other foreign text must use the latter.
//!
//! The pre-tokenizers of GGUF files are named, not described; the regular expressions behind
//! the names are facts of llama.cpp's `src/llama-vocab.cpp` and of the models' own `tokenizer.json`.

use std::collections::HashMap;
use std::path::Path;
use std::sync::OnceLock;

use serde_json::json;
use tokenizers::Tokenizer as Backend;

use super::gguf::{Gguf, Value};
use crate::error::{Error, Result};

/// A token that is matched as a whole in text.
#[derive(Clone, Debug, PartialEq)]
pub struct SpecialToken {
    /// Its id.
    pub id: u32,
    /// How it is written.
    pub text: String,
    /// Whether it swallows white space before it.
    pub lstrip: bool,
    /// Whether it swallows white space after it.
    pub rstrip: bool,
}

/// A tokenizer with both ways of reading special tokens.
pub struct Tokenizer {
    /// Takes special tokens in text as plain characters.
    plain: Backend,
    /// Parses them; made on first use, since most callers never need it.
    parsing: OnceLock<Backend>,
    special: Vec<SpecialToken>,
    size: usize,
}

/// Token types of GGUF (`llama_token_type`) that are matched as a whole: control and user-defined.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// The pattern of Llama 3; the one of GPT-2 is built into `ByteLevel`.
const LLAMA3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Pre-tokenizers that can be rebuilt from their GGUF name.
const PRE_TOKENIZERS: [&str; 5] = ["smollm", "gpt-2", "gpt2", "llama-bpe", "llama3"];

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// Exit 65 where the file is missing or malformed.
    pub fn from_json(path: &Path) -> Result<Self> {
        let bytes = fs_err::read(path).map_err(|e| Error::data("cannot read the tokenizer").because(e))?;
        Self::from_bytes(&bytes).map_err(|what| Error::data(format!("{}: {what}", path.display())))
    }

    /// Builds the tokenizer that a GGUF file describes.
    ///
    /// # Errors
    /// Exit 65 where its kind is not supported, or its parts contradict each other.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let model = gguf.text("tokenizer.ggml.model")?;
        if model != "gpt2" {
            let what = format!("the tokenizer `{model}` is not supported (`gpt2`, byte-level BPE, is)");
            return Err(gguf
                .fault(what)
                .with_help("use the model's Hugging Face folder, whose tokenizer.json is read whole"));
        }
        let pre = gguf.text("tokenizer.ggml.pre")?;
        let pre_tokenizer = pre_tokenizer(pre).ok_or_else(|| {
            let what = format!("the pre-tokenizer `{pre}` is not supported ({} are)", PRE_TOKENIZERS.join(", "));
            gguf.fault(what).with_help("use the model's Hugging Face folder, whose tokenizer.json is read whole")
        })?;
        let tokens = gguf.texts("tokenizer.ggml.tokens")?;
        let merges: Vec<(&str, &str)> = gguf
            .texts("tokenizer.ggml.merges")?
            .into_iter()
            .map(|m| m.split_once(' ').ok_or_else(|| gguf.fault(format!("the merge `{m}` is not a pair"))))
            .collect::<Result<_>>()?;
        let types = gguf.array_opt("tokenizer.ggml.token_type")?.unwrap_or_default();
        if !types.is_empty() && types.len() != tokens.len() {
            return Err(gguf.fault(format!("{} tokens have {} token types", tokens.len(), types.len())));
        }
        let vocab: HashMap<&str, usize> = tokens.iter().enumerate().map(|(i, t)| (*t, i)).collect();
        if vocab.len() != tokens.len() {
            return Err(gguf.fault("two entries of `tokenizer.ggml.tokens` are the same"));
        }
        let added: Vec<_> = types
            .iter()
            .enumerate()
            .filter_map(|(i, t)| match t {
                Value::I64(n) if *n == CONTROL || *n == USER_DEFINED => Some((i, *n == CONTROL)),
                _ => None,
            })
            .map(|(i, special)| {
                json!({"id": i, "content": tokens[i], "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": special})
            })
            .collect();
        let description = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
            "pre_tokenizer": pre_tokenizer, "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                      "ignore_merges": pre.starts_with("llama"), "vocab": vocab, "merges": merges},
        });
        let bytes =
            serde_json::to_vec(&description).map_err(|e| Error::internal("a tokenizer has no JSON").because(e))?;
        Self::from_bytes(&bytes).map_err(|what| gguf.fault(what))
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let mut plain = Backend::from_bytes(bytes).map_err(|e| format!("not a tokenizer: {e}"))?;
        // Scoring wants every token of a text: whatever the file says of padding and truncation is for training.
        plain.with_padding(None).with_truncation(None).map_err(|e| format!("not a tokenizer: {e}"))?;
        plain.set_encode_special_tokens(true);
        let added = plain.get_added_tokens_decoder();
        let mut special: Vec<SpecialToken> = added
            .iter()
            // One character cannot be told from text by a mark inside it (`chat.rs`), so it stays text.
            .filter(|(_, t)| t.special && t.content.chars().nth(1).is_some())
            .map(|(id, t)| SpecialToken { id: *id, text: t.content.clone(), lstrip: t.lstrip, rstrip: t.rstrip })
            .collect();
        special.sort_by_key(|t| t.id);
        // Ids need not be dense: the size is what a table indexed by id must have.
        let size = plain.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1);
        if size == 0 {
            return Err("the vocabulary is empty".to_owned());
        }
        Ok(Tokenizer { plain, parsing: OnceLock::new(), special, size })
    }

    /// As the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// Only our bugs.
    pub fn to_json(&self) -> Result<String> {
        self.plain.to_string(true).map_err(|e| Error::internal(format!("a tokenizer has no JSON: {e}")))
    }

    /// Ids of a text in which special tokens are plain characters.
    pub fn encode_text(&self, text: &str) -> Vec<u32> {
        encode(&self.plain, text)
    }

    /// Ids of a text in which special tokens are parsed. Never for text of others.
    pub fn encode_special(&self, text: &str) -> Vec<u32> {
        let parsing = self.parsing.get_or_init(|| {
            let mut backend = self.plain.clone();
            backend.set_encode_special_tokens(false);
            backend
        });
        encode(parsing, text)
    }

    /// Text of ids, special tokens written out; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing.
    pub fn decode(&self, ids: &[u32]) -> String {
        // The byte-level decoder cannot fail; others give no text for what they cannot read.
        self.plain.decode(ids, false).unwrap_or_default()
    }

    /// Text of ids without the special tokens.
    pub fn decode_without_special(&self, ids: &[u32]) -> String {
        self.plain.decode(ids, true).unwrap_or_default()
    }

    /// One more than the largest id.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The special tokens by id.
    pub fn special(&self) -> &[SpecialToken] {
        &self.special
    }

    /// The text of one token.
    pub fn token(&self, id: u32) -> Option<String> {
        self.plain.id_to_token(id)
    }
}

/// Without BOS or other additions: chat templates write those themselves.
fn encode(backend: &Backend, text: &str) -> Vec<u32> {
    // Byte-level models encode every text; a word model without an unknown token can fail, and then has no ids for it.
    backend.encode_fast(text, false).map(|e| e.get_ids().to_vec()).unwrap_or_default()
}

/// The `tokenizer.json` form of a pre-tokenizer that GGUF only names.
fn pre_tokenizer(name: &str) -> Option<serde_json::Value> {
    let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    match name {
        // Every digit alone (all of Unicode N*), then GPT-2's pattern on each stretch between.
        "smollm" => Some(json!({"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true}, byte_level(true)]})),
        "gpt-2" | "gpt2" => Some(byte_level(true)),
        "llama-bpe" | "llama3" => Some(json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": false},
            byte_level(false)]})),
        _ => None,
    }
}
