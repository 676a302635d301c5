//! Text to token ids and back, exactly as the model was trained.
//!
//! In: a `tokenizer.json`, or the `tokenizer.ggml.*` metadata of a GGUF file. Out: [`Tokenizer`].
//! Special tokens in a text (`<|im_end|>`) are either parsed or taken as the characters they are
//! written with: item titles and other foreign text must use the latter.

mod from_gguf;
mod json;
mod special;
mod spm;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::OnceLock;

use serde_json::{Value as Json, json};
use tokenizers::{AddedToken, Tokenizer as Backend};

pub use self::special::{Piece, SpecialToken, split_special};

use self::from_gguf::{Described, describe};
use self::special::is_markup;
use self::spm::{Kind, Pieces};
use super::gguf::Gguf;
use crate::error::{Error, Result};

/// A tokenizer with both ways of reading special tokens.
pub struct Tokenizer {
    model: Model,
    special: Vec<SpecialToken>,
    size: usize,
    leading: Option<u32>,
}

/// What turns stretches of plain text into ids.
enum Model {
    /// The tokenizers library; special tokens are plain characters for it. Boxed: it is large.
    Described(Box<Variants>),
    /// Our own SentencePiece.
    Pieces(Pieces),
}

/// One tokenizer for texts and for what follows others; the latter two are made on first use.
struct Variants {
    text: Backend,
    /// For text behind a special token: white space that only the first text gets is left out.
    after_special: OnceLock<Option<Backend>>,
    /// For text behind text: no white space is put in front.
    continuation: OnceLock<Option<Backend>>,
}

/// What every tokenizer must read and write when it is opened.
const PROBES: [&str; 3] = ["", " The night, 1957!\n", "映\u{301}"];

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
        let (described, adds_bos) = describe(gguf)?;
        let mut tokenizer = match described {
            Described::Pieces(pieces) => Self::from_pieces(pieces),
            Described::Bpe(json) => {
                let bytes =
                    serde_json::to_vec(&json).map_err(|e| Error::internal("a tokenizer has no JSON").because(e))?;
                Self::from_bytes(&bytes).map_err(|what| gguf.fault(what))?
            }
        };
        let bos = gguf.count_opt("tokenizer.ggml.bos_token_id")?.and_then(|id| u32::try_from(id).ok());
        tokenizer.leading = bos.filter(|id| adds_bos && (*id as usize) < tokenizer.size);
        Ok(tokenizer)
    }

    /// Reads the bytes of a `tokenizer.json`.
    ///
    /// # Errors
    /// In words, where they are none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        json::check(bytes).map_err(|e| format!("not a tokenizer: {e}"))?;
        // Where the library panics all the same, the file is at fault.
        catch_unwind(|| Self::build(bytes))
            .unwrap_or_else(|_| Err("not a tokenizer: the parts of the file contradict each other".to_owned()))
    }

    fn build(bytes: &[u8]) -> Result<Self, String> {
        let mut plain = Backend::from_bytes(bytes).map_err(|e| format!("not a tokenizer: {e}"))?;
        // Scoring wants every token of a text: whatever the file says of padding and truncation is for training.
        plain.with_padding(None).with_truncation(None).map_err(|e| format!("not a tokenizer: {e}"))?;
        plain.set_encode_special_tokens(true);
        let added = plain.get_added_tokens_decoder();
        let mut special: Vec<SpecialToken> = added
            .iter()
            // One character cannot be told from text by a mark inside it (`chat.rs`), so it stays text.
            .filter(|(_, t)| (t.special || is_markup(&t.content)) && t.content.chars().nth(1).is_some())
            .map(|(id, t)| SpecialToken {
                id: *id,
                text: t.content.clone(),
                lstrip: t.lstrip,
                rstrip: t.rstrip,
                hidden: t.special,
            })
            .collect();
        special.sort_by_key(|t| t.id);
        // Markup that the file does not call special must not be read in plain text either.
        let markup = special.iter().filter(|t| !t.hidden).map(|t| AddedToken::from(t.text.clone(), true));
        let markup: Vec<AddedToken> = markup.collect();
        if !markup.is_empty() {
            plain.add_special_tokens(markup).map_err(|e| format!("not a tokenizer: {e}"))?;
        }
        // Ids need not be dense: the size is what a table indexed by id must have.
        let size = plain.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1);
        if size == 0 {
            return Err("the vocabulary is empty".to_owned());
        }
        // What the file's post-processor puts before every text, if that is a special token.
        let leading = plain.encode_fast("", true).ok().and_then(|e| e.get_ids().first().copied());
        let leading = leading.filter(|id| special.iter().any(|t| t.id == *id));
        // Parts that do not fit each other show when they are used.
        for text in PROBES {
            let ids = plain.encode_fast(text, false).map_err(|e| format!("it cannot read `{text}`: {e}"));
            plain.decode(ids?.get_ids(), false).map_err(|e| format!("it cannot write `{text}`: {e}"))?;
        }
        let variants = Variants { text: plain, after_special: OnceLock::new(), continuation: OnceLock::new() };
        Ok(Tokenizer { model: Model::Described(Box::new(variants)), special, size, leading })
    }

    fn from_pieces(pieces: Pieces) -> Self {
        let ids = 0..u32::try_from(pieces.size()).unwrap_or(u32::MAX);
        let special = ids
            .filter_map(|id| {
                let (text, kind) = pieces.piece(id)?;
                let control = matches!(kind, Kind::Control | Kind::Unknown);
                let is_special =
                    (control || kind == Kind::UserDefined && is_markup(text)) && text.chars().nth(1).is_some();
                is_special.then(|| SpecialToken {
                    id,
                    text: text.to_owned(),
                    lstrip: false,
                    rstrip: false,
                    hidden: control,
                })
            })
            .collect();
        Tokenizer { size: pieces.size(), model: Model::Pieces(pieces), special, leading: None }
    }

    /// As the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// Exit 65 for a SentencePiece vocabulary of a GGUF file, which has no such form here.
    pub fn to_json(&self) -> Result<String> {
        match &self.model {
            Model::Described(variants) => {
                variants.text.to_string(true).map_err(|e| Error::internal(format!("a tokenizer has no JSON: {e}")))
            }
            Model::Pieces(_) => Err(Error::data("a SentencePiece vocabulary of a GGUF file cannot be written")
                .with_help("use the model's Hugging Face folder, whose tokenizer.json is copied")),
        }
    }

    /// Ids of a text in which special tokens are plain characters.
    pub fn encode_text(&self, text: &str) -> Vec<u32> {
        match &self.model {
            Model::Described(variants) => encode(&variants.text, text),
            Model::Pieces(pieces) => pieces.encode(text, true),
        }
    }

    /// Ids of a text that stands behind a special token, which are plain characters in it: as [`Tokenizer::encode_text`],
    /// but for models that put white space before the first text only.
    pub fn encode_after_special(&self, text: &str) -> Vec<u32> {
        match &self.model {
            Model::Described(v) => {
                let variant = v.after_special.get_or_init(|| without_prefix(&v.text, false));
                encode(variant.as_ref().unwrap_or(&v.text), text)
            }
            Model::Pieces(pieces) => pieces.encode(text, true),
        }
    }

    /// Ids of a text that goes on where another ended, special tokens being plain characters: no white space is put in
    /// front, as SentencePiece models otherwise do.
    pub fn encode_continuation(&self, text: &str) -> Vec<u32> {
        match &self.model {
            Model::Described(v) => {
                let variant = v.continuation.get_or_init(|| without_prefix(&v.text, true));
                encode(variant.as_ref().unwrap_or(&v.text), text)
            }
            Model::Pieces(pieces) => pieces.encode(text, false),
        }
    }

    /// Ids of a text in which special tokens are parsed. Never for text of others.
    pub fn encode_special(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        for (n, piece) in split_special(text, &self.special).into_iter().enumerate() {
            match piece {
                Piece::Special(id) => ids.push(id),
                Piece::Text(text) if n == 0 => ids.extend(self.encode_text(text)),
                Piece::Text(text) => ids.extend(self.encode_after_special(text)),
            }
        }
        ids
    }

    /// Text of ids, special tokens written out; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing.
    pub fn decode(&self, ids: &[u32]) -> String {
        match &self.model {
            // The byte-level decoder cannot fail; others give no text for what they cannot read.
            Model::Described(variants) => {
                let text = catch_unwind(AssertUnwindSafe(|| variants.text.decode(ids, false)));
                text.map(Result::unwrap_or_default).unwrap_or_default()
            }
            Model::Pieces(pieces) => pieces.decode(ids),
        }
    }

    /// Text of ids without the special tokens.
    pub fn decode_without_special(&self, ids: &[u32]) -> String {
        let hidden = |id: &u32| self.special.iter().any(|t| t.hidden && t.id == *id);
        let ids: Vec<u32> = ids.iter().copied().filter(|id| !hidden(id)).collect();
        self.decode(&ids)
    }

    /// One more than the largest id.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The special tokens by id.
    pub fn special(&self) -> &[SpecialToken] {
        &self.special
    }

    /// The special token with which the model begins texts, where it does (`llama` does, `qwen2` does not).
    pub fn leading(&self) -> Option<u32> {
        self.leading
    }

    /// The text of one token.
    pub fn token(&self, id: u32) -> Option<String> {
        match &self.model {
            Model::Described(variants) => variants.text.id_to_token(id),
            Model::Pieces(pieces) => pieces.piece(id).map(|(text, _)| text.to_owned()),
        }
    }
}

/// Without BOS or other additions: chat templates write those themselves.
fn encode(backend: &Backend, text: &str) -> Vec<u32> {
    // Byte-level models encode every text; a word model without an unknown token can fail, and then has no ids for it.
    // A damaged one may make the library panic on some texts.
    let ids = catch_unwind(AssertUnwindSafe(|| backend.encode_fast(text, false).map(|e| e.get_ids().to_vec())));
    ids.map(Result::unwrap_or_default).unwrap_or_default()
}

/// The tokenizer without the white space that it puts before a text: `all` of it, or what only the first text gets.
/// `None` where it puts none.
fn without_prefix(backend: &Backend, all: bool) -> Option<Backend> {
    let mut changed = false;
    let mut pre = serde_json::to_value(backend.get_pre_tokenizer()).ok()?;
    let mut normalizer = serde_json::to_value(backend.get_normalizer()).ok()?;
    each_step(&mut pre, "pretokenizers", &mut |step| {
        if step["type"] == "Metaspace"
            && (step["prepend_scheme"] == "first" || all && step["prepend_scheme"] == "always")
        {
            step["prepend_scheme"] = json!("never");
            changed = true;
        }
        if all && step["type"] == "ByteLevel" && step["add_prefix_space"] == true {
            step["add_prefix_space"] = json!(false);
            changed = true;
        }
    });
    each_step(&mut normalizer, "normalizers", &mut |step| {
        if all && step["type"] == "Prepend" {
            *step = json!({"type": "Sequence", "normalizers": []});
            changed = true;
        }
    });
    if !changed {
        return None;
    }
    let mut backend = backend.clone();
    let pre: Option<tokenizers::PreTokenizerWrapper> = serde_json::from_value(pre).ok()?;
    let normalizer: Option<tokenizers::NormalizerWrapper> = serde_json::from_value(normalizer).ok()?;
    backend.with_pre_tokenizer(pre);
    backend.with_normalizer(normalizer).ok()?;
    Some(backend)
}

/// Calls `edit` with a step and with those inside it, where it is a sequence.
fn each_step(step: &mut Json, list: &str, edit: &mut impl FnMut(&mut Json)) {
    if let Some(steps) = step.get_mut(list).and_then(Json::as_array_mut) {
        steps.iter_mut().for_each(|step| each_step(step, list, edit));
    } else if step.is_object() {
        edit(step);
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llm/tokenizers").join(name)
    }

    fn open(name: &str) -> Tokenizer {
        match name.ends_with("json") {
            true => Tokenizer::from_json(&golden(name)).unwrap(),
            false => Tokenizer::from_gguf(&Gguf::open(&golden(name)).unwrap()).unwrap(),
        }
    }

    /// Vocabularies that `peers/golden_llm.py` trained; ids by `tokenizers` and `sentencepiece`.
    #[test]
    fn both_formats_give_the_ids_of_the_reference() {
        let want: Json = serde_json::from_slice(&std::fs::read(golden("golden.json")).unwrap()).unwrap();
        for (name, want) in want.as_object().unwrap() {
            for file in [format!("{name}.json"), format!("{name}.gguf")] {
                let tokenizer = open(&file);
                for row in want["rows"].as_array().unwrap() {
                    let text = row["text"].as_str().unwrap();
                    let ids: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
                    assert_eq!(tokenizer.encode_text(text), ids, "{file}: {text:?}");
                    assert_eq!(tokenizer.decode(&ids), row["decoded"].as_str().unwrap(), "{file}: {text:?}");
                }
                let bos = want["adds_bos"].as_bool().unwrap().then(|| want["bos"].as_u64().unwrap() as u32);
                assert_eq!(tokenizer.leading(), bos, "{file}");
            }
        }
    }

    #[test]
    fn white_space_goes_where_the_model_puts_it() {
        let want: Json = serde_json::from_slice(&std::fs::read(golden("golden.json")).unwrap()).unwrap();
        for (file, key) in [
            ("spm-first.json", "with_special_first"),
            ("spm.json", "with_special_legacy"),
            ("spm.gguf", "with_special_legacy"),
        ] {
            let want = &want["spm"][key];
            let ids: Vec<u32> = serde_json::from_value(want["ids"].clone()).unwrap();
            let tokenizer = open(file);
            assert_eq!(tokenizer.encode_special(want["text"].as_str().unwrap()), ids, "{file}");
            // A continuation is what is left of the whole after its beginning.
            let (whole, head) = (tokenizer.encode_text("the night"), tokenizer.encode_text("the"));
            assert_eq!([head, tokenizer.encode_continuation(" night")].concat(), whole, "{file}");
        }
        let tokenizer = open("gpt-2.json");
        assert_eq!(tokenizer.encode_continuation("the night"), tokenizer.encode_text("the night"));
    }

    #[test]
    fn markup_that_is_not_called_special_is_text_too() {
        let mut json: Json = serde_json::from_slice(&std::fs::read(golden("qwen2.json")).unwrap()).unwrap();
        let id = json["added_tokens"].as_array().unwrap().iter().map(|t| t["id"].as_u64().unwrap()).max().unwrap() + 1;
        for (n, content) in ["<tool_call>", "    "].into_iter().enumerate() {
            let token = json!({"id": id + n as u64, "content": content, "single_word": false, "lstrip": false,
                               "rstrip": false, "normalized": false, "special": false});
            json["added_tokens"].as_array_mut().unwrap().push(token);
        }
        let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
        let (call, spaces) = (id as u32, id as u32 + 1);
        assert!(!tokenizer.encode_text("a<tool_call>b").contains(&call));
        assert!(tokenizer.encode_text("a    b").contains(&spaces));
        let ids = tokenizer.encode_special("a<tool_call>b");
        assert!(ids.contains(&call));
        assert_eq!(tokenizer.decode_without_special(&ids), "a<tool_call>b");
        assert_eq!(tokenizer.decode(&tokenizer.encode_text("a<tool_call>b")), "a<tool_call>b");
    }
}
