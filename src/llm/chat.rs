//! Conversations to token ids, by the model's own chat template.
//!
//! In: messages. Out: ids. The template is Jinja, from the GGUF metadata, `chat_template.jinja`
//! or `tokenizer_config.json`, and rendered with the settings that transformers uses.
//!
//! Text inside a message can never become a special token. The trick: where a message's text
//! holds the spelling of one (or the beginning or end of one, which the template could
//! complete), a character that occurs nowhere else is put inside. The rendered text is split at special
//! tokens, which then are the template's alone; the character is taken out again, and the
//! stretches between are encoded as plain text.

use std::borrow::Cow;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::config::LlamaConfig;
use super::gguf::Gguf;
use super::template::ChatTemplate;
use super::tokenizer::{Piece, SpecialToken, Tokenizer, split_special};
use super::weights::is_folder;
use crate::error::{Error, Result};

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text; special tokens in it are plain characters.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into() }
    }
}

/// Tokenizer, chat template and context length of a model. Opens without loading weights.
pub struct ChatTokenizer {
    /// `None` for a folder of weights alone.
    tokenizer: Option<Tokenizer>,
    template: Option<ChatTemplate>,
    /// The token that begins every conversation, where the model says so; once, also where the template writes it.
    bos: Option<u32>,
    config: LlamaConfig,
    /// The file or folder, for messages.
    place: String,
}

/// Characters that Unicode reserves for use inside programs (noncharacters U+FDD0 to U+FDEF).
const MARKS: std::ops::RangeInclusive<char> = '\u{fdd0}'..='\u{fdef}';

impl ChatTokenizer {
    /// Opens the tokenizer of a GGUF file or of a Hugging Face folder.
    ///
    /// # Errors
    /// Exit 65 where a file is missing, damaged or of an unsupported kind, where the template is no valid Jinja, or where the
    /// vocabulary has more tokens than the embedding has rows.
    pub fn open(path: &Path) -> Result<Self> {
        if is_folder(path) { Self::from_folder(path) } else { Self::from_gguf(&Gguf::open(path)?) }
    }

    /// As [`ChatTokenizer::open`], but a folder may lack `tokenizer.json`.
    ///
    /// # Errors
    /// As [`ChatTokenizer::open`].
    pub fn open_weights_only(path: &Path) -> Result<Self> {
        if !is_folder(path) || path.join("tokenizer.json").exists() {
            return Self::open(path);
        }
        let config = LlamaConfig::from_hf(&path.join("config.json"))?;
        Ok(ChatTokenizer { tokenizer: None, template: None, bos: None, config, place: path.display().to_string() })
    }

    /// The tokenizer, or why there is none.
    ///
    /// # Errors
    /// Exit 65 for a folder of weights alone.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            Error::data(format!("{}: the model folder has no tokenizer.json", self.place))
                .with_help("give token ids, or put the model's tokenizer.json into the folder")
        })
    }

    /// Opens the tokenizer of an opened GGUF file.
    ///
    /// # Errors
    /// As [`ChatTokenizer::open`].
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let config = LlamaConfig::from_gguf(gguf)?;
        let tokenizer = Tokenizer::from_gguf(gguf)?;
        let template = match gguf.get("tokenizer.chat_template") {
            None => None,
            Some(_) => Some(gguf.text("tokenizer.chat_template")?.to_owned()),
        };
        let token = |id: Option<u32>| id.and_then(|id| tokenizer.token(id)).unwrap_or_default();
        let (bos, eos) = (token(config.bos), token(config.eos.first().copied()));
        let leading = tokenizer.leading();
        let template = template.map(|source| (source, bos, eos));
        Self::assemble(tokenizer, leading, template, config, gguf.path())
    }

    fn from_folder(folder: &Path) -> Result<Self> {
        let config = LlamaConfig::from_hf(&folder.join("config.json"))?;
        let tokenizer = Tokenizer::from_json(&folder.join("tokenizer.json"))?;
        let settings_path = folder.join("tokenizer_config.json");
        let settings: Json = if settings_path.is_file() {
            let bytes =
                fs_err::read(&settings_path).map_err(|e| Error::data("cannot read the tokenizer").because(e))?;
            serde_json::from_slice(&bytes)
                .map_err(|e| Error::data(format!("{}: not JSON: {e}", settings_path.display())))?
        } else {
            Json::Null
        };
        let template_path = folder.join("chat_template.jinja");
        let template = if template_path.is_file() {
            Some(
                fs_err::read_to_string(&template_path)
                    .map_err(|e| Error::data("cannot read the template").because(e))?,
            )
        } else {
            template_of(&settings["chat_template"])
        };
        // A token is written as text, or as an object with its `content`.
        let written = |key: &str, id: Option<u32>| {
            let entry = &settings[key];
            let text = entry.as_str().or_else(|| entry["content"].as_str()).map(str::to_owned);
            text.or_else(|| id.and_then(|id| tokenizer.token(id))).unwrap_or_default()
        };
        let (bos, eos) = (written("bos_token", config.bos), written("eos_token", config.eos.first().copied()));
        // The settings have the last word, as in transformers; else what the tokenizer itself puts first.
        let leading = match settings["add_bos_token"].as_bool() {
            Some(true) => config.bos.filter(|id| (*id as usize) < tokenizer.size()),
            Some(false) => None,
            None => tokenizer.leading(),
        };
        let template = template.map(|source| (source, bos, eos));
        Self::assemble(tokenizer, leading, template, config, folder)
    }

    /// `template` is its source, and how BOS and EOS are written.
    fn assemble(
        tokenizer: Tokenizer,
        leading: Option<u32>,
        template: Option<(String, String, String)>,
        config: LlamaConfig,
        path: &Path,
    ) -> Result<Self> {
        let place = path.display().to_string();
        if tokenizer.size() > config.vocab_size {
            let (tokens, rows) = (tokenizer.size(), config.vocab_size);
            return Err(Error::data(format!(
                "{place}: the vocabulary has {tokens} tokens, but the weights have {rows}"
            ))
            .with_help("the tokenizer and the weights are of different models"));
        }
        let template = template
            .map(|(source, bos, eos)| ChatTemplate::compile(source, bos, eos))
            .transpose()
            .map_err(|what| Error::data(format!("{place}: the chat template is not valid: {what}")))?;
        Ok(ChatTokenizer { tokenizer: Some(tokenizer), template, bos: leading, config, place })
    }

    /// A tokenizer with a template, without a model.
    #[cfg(test)]
    pub(crate) fn for_tests(tokenizer: Tokenizer, source: String, bos: &str, eos: &str) -> Self {
        let config = LlamaConfig::from_hf_bytes(include_bytes!(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/golden/llm/tiny/config.json"
        )));
        let config = LlamaConfig { vocab_size: tokenizer.size(), ..config.expect("the golden file is valid") };
        let (leading, path) = (tokenizer.leading(), Path::new("test"));
        Self::assemble(tokenizer, leading, Some((source, bos.to_owned(), eos.to_owned())), config, path)
            .expect("the test's template is valid")
    }

    /// Ids of a conversation, followed by the opening of the assistant's answer.
    ///
    /// # Errors
    /// Exit 65 where the model has no chat template or the template refuses the messages.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>> {
        self.encode_conversation(messages, true)
    }

    /// Ids of a conversation, with or without the opening of the assistant's answer.
    ///
    /// # Errors
    /// As [`ChatTokenizer::encode_chat`].
    pub fn encode_conversation(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<u32>> {
        let tokenizer = self.tokenizer()?;
        let (rendered, mark) = self.render_marked(messages, add_generation_prompt)?;
        let mut ids = Vec::new();
        for (n, piece) in split_special(&rendered, tokenizer.special()).into_iter().enumerate() {
            match piece {
                Piece::Special(id) => ids.push(id),
                Piece::Text(text) => {
                    let text =
                        if text.contains(mark) { Cow::Owned(text.replace(mark, "")) } else { Cow::Borrowed(text) };
                    let first = n == 0 && self.bos.is_none();
                    ids.extend(if first {
                        tokenizer.encode_text(&text)
                    } else {
                        tokenizer.encode_after_special(&text)
                    });
                }
            }
        }
        match self.bos {
            Some(bos) if ids.first() != Some(&bos) => ids.insert(0, bos),
            _ => {}
        }
        Ok(ids)
    }

    /// Tokenizer and template as the files of a Hugging Face folder, by name; none for a folder of weights alone.
    ///
    /// # Errors
    /// Only our bugs.
    pub fn to_files(&self) -> Result<Vec<(&'static str, String)>> {
        let Some(tokenizer) = &self.tokenizer else { return Ok(Vec::new()) };
        let mut settings = serde_json::json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": self.config.context,
            "clean_up_tokenization_spaces": false,
        });
        let mut files = vec![("tokenizer.json", tokenizer.to_json()?)];
        if let Some(template) = &self.template {
            for (key, token) in ["bos_token", "eos_token"].into_iter().zip(template.bos_and_eos()) {
                if !token.is_empty() {
                    settings[key] = Json::String(token.to_owned());
                }
            }
            files.push(("chat_template.jinja", template.source().to_owned()));
        }
        files.push(("tokenizer_config.json", format!("{settings:#}")));
        Ok(files)
    }

    /// The rendered text of a conversation.
    ///
    /// # Errors
    /// As [`ChatTokenizer::encode_chat`].
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let (rendered, mark) = self.render_marked(messages, add_generation_prompt)?;
        Ok(rendered.replace(mark, ""))
    }

    /// The rendered text with marks inside the special tokens of messages, and the mark.
    fn render_marked(&self, messages: &[Message], add_generation_prompt: bool) -> Result<(String, char)> {
        let template = self.template.as_ref().ok_or_else(|| {
            Error::data(format!("{}: the model has no chat template", self.place))
                .with_help("use an instruction-tuned model, or put its chat_template.jinja into the folder")
        })?;
        let used = |mark: &char| {
            template.source().contains(*mark)
                || messages.iter().any(|m| m.role.contains(*mark) || m.content.contains(*mark))
        };
        let mark = MARKS
            .into_iter()
            .find(|m| !used(m))
            .ok_or_else(|| Error::data("a message uses every character that Unicode reserves for programs"))?;
        let special = self.tokenizer()?.special();
        let marked: Vec<Message> = messages
            .iter()
            .map(|m| Message { role: guard(&m.role, special, mark), content: guard(&m.content, special, mark) })
            .collect();
        let rendered = template.render(&marked, add_generation_prompt).map_err(|what| {
            Error::data(format!("{}: the chat template refuses the messages: {what}", self.place).replace(mark, ""))
        })?;
        Ok((rendered, mark))
    }

    /// Ids of a text in which special tokens are plain characters; none for a folder of weights alone.
    pub fn encode_text(&self, text: &str) -> Vec<u32> {
        self.tokenizer.as_ref().map(|t| t.encode_text(text)).unwrap_or_default()
    }

    /// Text of ids, special tokens written out; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.tokenizer.as_ref().map(|t| t.decode(ids)).unwrap_or_default()
    }

    /// Tokens that a prompt and what follows it may have at most.
    pub fn context_length(&self) -> usize {
        self.config.context
    }

    /// Rows of the embedding: ids are below it.
    pub fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    /// Tokens that end a text.
    pub fn end_of_text(&self) -> &[u32] {
        &self.config.eos
    }
}

/// The template of `tokenizer_config.json`: text, or a list of named ones, of which `default` is meant.
fn template_of(entry: &Json) -> Option<String> {
    let named = |name: &str| entry.as_array()?.iter().find(|t| t["name"] == name)?["template"].as_str();
    entry.as_str().or_else(|| named("default")).map(str::to_owned)
}

/// Puts `mark` into every place of a message's text where a special token is written, ends or begins.
fn guard(text: &str, special: &[SpecialToken], mark: char) -> String {
    // Byte positions that get a mark.
    let mut cuts: Vec<usize> = Vec::new();
    for token in special {
        let spelling = token.text.as_str();
        let first = spelling.chars().next().map_or(0, char::len_utf8);
        // Overlapping ones too: a search that goes on one character later.
        let mut from = 0;
        while let Some(found) = text[from..].find(spelling) {
            let at = from + found;
            cuts.push(at + first);
            from = at + first;
        }
        // What the template could complete on either side, also after it has trimmed the text.
        for body in [text, text.trim()] {
            let start = text.len() - text.trim_start().len();
            let offset = if body.len() == text.len() { 0 } else { start };
            for (i, _) in spelling.char_indices().skip(1) {
                if body.ends_with(&spelling[..i]) {
                    cuts.push(offset + body.len() - i + first);
                }
                if body.starts_with(&spelling[i..]) {
                    cuts.push(offset);
                }
            }
        }
    }
    cuts.sort_unstable();
    cuts.dedup();
    let mut out = String::with_capacity(text.len() + cuts.len() * mark.len_utf8());
    let mut from = 0;
    for cut in cuts {
        out.push_str(&text[from..cut]);
        out.push(mark);
        from = cut;
    }
    out.push_str(&text[from..]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: u32, text: &str) -> SpecialToken {
        SpecialToken { id, text: text.to_owned(), lstrip: false, rstrip: false, hidden: true }
    }

    #[test]
    fn guarded_text_never_makes_a_token_with_its_surroundings() {
        let special = [token(0, "<|end|>"), token(1, "><")];
        for text in ["<|end|>", "a <|end|> b", "|end|>", "  end|> ", "<|e", "<", ">", "<|<|end|>", "><><", "plain", ""]
        {
            let guarded = guard(text, &special, '#');
            assert_eq!(guarded.replace('#', ""), text);
            for t in &special {
                for (i, _) in t.text.char_indices().chain([(t.text.len(), ' ')]) {
                    let around = format!("{}{}{}", &t.text[..i], guarded, &t.text[i..]);
                    for whole in [around, format!("{}{}{}", &t.text[..i], guarded.trim(), &t.text[i..])] {
                        let found =
                            split_special(&whole, &special).iter().filter(|p| matches!(p, Piece::Special(_))).count();
                        // Only what the surroundings spell on their own, or where the text is empty.
                        let own = usize::from(i == 0 || i == t.text.len() || text.is_empty());
                        assert!(found <= own, "{whole:?} has {found} tokens");
                    }
                }
            }
        }
    }

    #[test]
    fn templates_come_in_three_forms() {
        assert_eq!(template_of(&serde_json::json!("t")), Some("t".to_owned()));
        assert_eq!(template_of(&serde_json::json!([{"name": "default", "template": "d"}])), Some("d".to_owned()));
        assert_eq!(template_of(&Json::Null), None);
    }
}
