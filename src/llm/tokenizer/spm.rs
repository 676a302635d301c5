//! SentencePiece's BPE: pieces with scores, merged best score first.
//!
//! In: pieces, scores and types of a GGUF file (`tokenizer.ggml.model = "llama"`). Out: [`Pieces`].
//! Reference: sentencepiece, `bpe_model.cc`; llama.cpp, `llm_tokenizer_spm`. White space is written `▁`; a character
//! without a piece becomes its bytes.
//!
//! Where we deviate: control pieces are never made by merging (llama.cpp can), so no text becomes one.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// How white space is written inside pieces.
const SPACE: char = '▁';

/// GGUF's type of a piece (`llama_token_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Made by merging.
    Normal,
    /// Stands for what no piece spells.
    Unknown,
    /// Never made from text.
    Control,
    /// Matched as a whole before any merging.
    UserDefined,
    /// Merged on the way to others, never given out.
    Unused,
    /// One byte.
    Byte,
}

impl Kind {
    /// The type of an id in the file.
    pub fn from_id(id: f64) -> Option<Self> {
        let kinds = [Kind::Normal, Kind::Unknown, Kind::Control, Kind::UserDefined, Kind::Unused, Kind::Byte];
        kinds.into_iter().enumerate().find(|(i, _)| (*i + 1) as f64 == id).map(|(_, kind)| kind)
    }
}

/// A vocabulary of pieces.
#[derive(Clone, Debug)]
pub struct Pieces {
    texts: Vec<String>,
    kinds: Vec<Kind>,
    scores: Vec<f32>,
    /// Text of normal, user-defined and unused pieces -> id.
    ids: HashMap<String, u32>,
    /// Id of each byte's piece.
    bytes: Vec<Option<u32>>,
    unknown: Option<u32>,
    /// User-defined pieces by their first character, the longest first.
    whole: HashMap<char, Vec<u32>>,
    /// Whether a text starts with a space that nobody wrote.
    space_prefix: bool,
}

/// A stretch of text that is one piece so far; a list linked by place.
struct Symbol {
    from: usize,
    /// Bytes; 0 where it was merged into the one before.
    len: usize,
    previous: Option<usize>,
    next: Option<usize>,
    /// A user-defined piece, which does not merge.
    frozen: bool,
}

/// Two neighbours that make a piece: the best score first, then the leftmost.
#[derive(PartialEq)]
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    /// Bytes of both together: whether they still are what they were.
    len: usize,
}

impl Eq for Pair {}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.score.total_cmp(&other.score).then(Reverse(self.left).cmp(&Reverse(other.left)))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Pieces {
    /// Makes a vocabulary; the three lists are of one length.
    ///
    /// # Errors
    /// In words, where lengths differ, two pieces of text are the same, or nothing stands for unknown characters.
    pub fn new(texts: Vec<String>, kinds: Vec<Kind>, scores: Vec<f32>, space_prefix: bool) -> Result<Self, String> {
        if texts.len() != scores.len() || texts.len() != kinds.len() {
            return Err(format!("{} tokens have {} scores and {} token types", texts.len(), scores.len(), kinds.len()));
        }
        let mut pieces = Pieces {
            ids: HashMap::with_capacity(texts.len()),
            bytes: vec![None; 256],
            unknown: None,
            whole: HashMap::new(),
            texts,
            kinds,
            scores,
            space_prefix,
        };
        for (i, (text, kind)) in pieces.texts.iter().zip(&pieces.kinds).enumerate() {
            let id = u32::try_from(i).map_err(|_| format!("{} tokens are too many", pieces.texts.len()))?;
            match kind {
                Kind::Normal | Kind::UserDefined | Kind::Unused => {
                    if !text.is_empty() && pieces.ids.insert(text.clone(), id).is_some() {
                        return Err(format!("two entries of `tokenizer.ggml.tokens` are the same (`{text}`)"));
                    }
                    if let (Kind::UserDefined, Some(first)) = (kind, text.chars().next()) {
                        pieces.whole.entry(first).or_default().push(id);
                    }
                }
                Kind::Byte => {
                    let digits = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>')).filter(|t| t.len() == 2);
                    let byte = digits.and_then(|d| u8::from_str_radix(d, 16).ok());
                    let byte =
                        byte.ok_or_else(|| format!("the byte token `{text}` is not written <0x00> to <0xFF>"))?;
                    pieces.bytes[usize::from(byte)] = Some(id);
                }
                Kind::Unknown => pieces.unknown = pieces.unknown.or(Some(id)),
                Kind::Control => {}
            }
        }
        for ids in pieces.whole.values_mut() {
            ids.sort_by_key(|id| Reverse(pieces.texts[*id as usize].len()));
        }
        if pieces.unknown.is_none() && pieces.bytes.contains(&None) {
            return Err("the vocabulary has neither all bytes nor a token for unknown characters".to_owned());
        }
        Ok(pieces)
    }

    /// Ids of a text. With `prefix`, as a text of its own (a space goes in front where the model is made so).
    pub fn encode(&self, text: &str, prefix: bool) -> Vec<u32> {
        if text.is_empty() {
            return Vec::new();
        }
        let mut spaced = String::with_capacity(text.len() + SPACE.len_utf8());
        if prefix && self.space_prefix {
            spaced.push(SPACE);
        }
        spaced.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));
        let mut symbols = self.symbols(&spaced);
        // What an unused piece was made of, so that it can be taken apart again.
        let mut parts: HashMap<&str, usize> = HashMap::new();
        let mut pairs = BinaryHeap::new();
        for right in 1..symbols.len() {
            pairs.extend(self.pair(&spaced, &symbols, right - 1, right, &mut parts));
        }
        while let Some(pair) = pairs.pop() {
            let (left, right) = (&symbols[pair.left], &symbols[pair.right]);
            // One of them was merged with another meanwhile.
            if left.len == 0 || right.len == 0 || left.len + right.len != pair.len || left.next != Some(pair.right) {
                continue;
            }
            let after = right.next;
            symbols[pair.left].len = pair.len;
            symbols[pair.left].next = after;
            symbols[pair.right].len = 0;
            if let Some(after) = after {
                symbols[after].previous = Some(pair.left);
                pairs.extend(self.pair(&spaced, &symbols, pair.left, after, &mut parts));
            }
            if let Some(before) = symbols[pair.left].previous {
                pairs.extend(self.pair(&spaced, &symbols, before, pair.left, &mut parts));
            }
        }
        let mut ids = Vec::new();
        let mut unknown_before = false;
        for symbol in symbols.iter().filter(|s| s.len > 0) {
            self.give(&spaced[symbol.from..symbol.from + symbol.len], &parts, &mut ids, &mut unknown_before);
        }
        ids
    }

    /// A text as characters and user-defined pieces.
    fn symbols(&self, text: &str) -> Vec<Symbol> {
        let mut out: Vec<Symbol> = Vec::with_capacity(text.len());
        let mut from = 0;
        while let Some(c) = text[from..].chars().next() {
            let whole = self.whole.get(&c).into_iter().flatten().map(|id| self.texts[*id as usize].as_str());
            let found = whole.into_iter().find(|piece| text[from..].starts_with(piece));
            let len = found.map_or(c.len_utf8(), str::len);
            let at = out.len();
            if let Some(before) = out.last_mut() {
                before.next = Some(at);
            }
            out.push(Symbol { from, len, previous: at.checked_sub(1), next: None, frozen: found.is_some() });
            from += len;
        }
        out
    }

    /// The pair of two neighbours, where together they are a piece.
    fn pair<'a>(
        &self,
        text: &'a str,
        symbols: &[Symbol],
        left: usize,
        right: usize,
        parts: &mut HashMap<&'a str, usize>,
    ) -> Option<Pair> {
        let (l, r) = (&symbols[left], &symbols[right]);
        if l.frozen || r.frozen {
            return None;
        }
        let len = l.len + r.len;
        let both = &text[l.from..l.from + len];
        let id = *self.ids.get(both)?;
        if self.kinds[id as usize] == Kind::Unused {
            parts.insert(both, l.len);
        }
        Some(Pair { score: self.scores[id as usize], left, right, len })
    }

    /// The ids of a symbol: its piece, the pieces that an unused one was made of, or its bytes.
    fn give(&self, symbol: &str, parts: &HashMap<&str, usize>, ids: &mut Vec<u32>, unknown_before: &mut bool) {
        // Pieces to take apart, the first on top: an unused one may be made of unused ones, deeper than a stack goes.
        let mut left = vec![symbol];
        while let Some(piece) = left.pop() {
            let id = self.ids.get(piece).filter(|id| self.kinds[**id as usize] != Kind::Unused);
            if let Some(id) = id {
                ids.push(*id);
                *unknown_before = false;
            } else if let Some(cut) = parts.get(piece) {
                left.extend([&piece[*cut..], &piece[..*cut]]);
            } else {
                let bytes: Option<Vec<u32>> = piece.bytes().map(|b| self.bytes[usize::from(b)]).collect();
                match (bytes, self.unknown) {
                    (Some(bytes), _) => {
                        ids.extend(bytes);
                        *unknown_before = false;
                    }
                    // Unknown characters in a row are one token.
                    (None, Some(unknown)) if !*unknown_before => {
                        ids.push(unknown);
                        *unknown_before = true;
                    }
                    (None, _) => {}
                }
            }
        }
    }

    /// Text of ids; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing. The space that
    /// [`Pieces::encode`] puts in front is taken off again.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::new();
        for (text, kind) in ids.iter().filter_map(|id| Some((self.texts.get(*id as usize)?, self.kinds[*id as usize])))
        {
            match kind {
                Kind::Byte => bytes.extend(u8::from_str_radix(&text[3..5], 16)),
                _ => bytes.extend(text.replace(SPACE, " ").bytes()),
            }
        }
        let text = String::from_utf8_lossy(&bytes);
        match text.strip_prefix(' ') {
            Some(rest) if self.space_prefix => rest.to_owned(),
            _ => text.into_owned(),
        }
    }

    /// Number of pieces.
    pub fn size(&self) -> usize {
        self.texts.len()
    }

    /// Text and type of a piece.
    pub fn piece(&self, id: u32) -> Option<(&str, Kind)> {
        let id = usize::try_from(id).ok()?;
        Some((self.texts.get(id)?, self.kinds[id]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(list: &[(&str, Kind, f32)]) -> Pieces {
        let (mut texts, mut kinds, mut scores) = (vec![], vec![], vec![]);
        for (text, kind, score) in list {
            texts.push((*text).to_owned());
            kinds.push(*kind);
            scores.push(*score);
        }
        Pieces::new(texts, kinds, scores, true).unwrap()
    }

    #[test]
    fn the_best_score_merges_first_and_the_leftmost_of_equal_ones() {
        use Kind::*;
        let p = pieces(&[
            ("<unk>", Unknown, 0.0),
            ("▁", Normal, -9.0),
            ("a", Normal, -8.0),
            ("b", Normal, -7.0),
            ("ab", Normal, -2.0),
            ("ba", Normal, -1.0),
            ("aa", Normal, -3.0),
        ]);
        // "ba" is better than "ab", so `aba` is a + ba.
        assert_eq!(p.encode("aba", true), [1, 2, 5]);
        assert_eq!(p.encode("aaa", false), [6, 2]);
        // Unknown characters in a row are one token.
        assert_eq!(p.encode("a??b", false), [2, 0, 3]);
        assert_eq!(p.decode(&p.encode(" ab", true)), " ab");
    }

    #[test]
    fn unused_pieces_are_taken_apart_and_user_defined_ones_are_whole() {
        use Kind::*;
        let p = pieces(&[
            ("<unk>", Unknown, 0.0),
            ("a", Normal, -9.0),
            ("b", Normal, -9.0),
            ("ab", Unused, -1.0),
            ("abb", Normal, -2.0),
            ("<x>", UserDefined, 0.0),
            ("<s>", Control, 0.0),
        ]);
        assert_eq!(p.encode("abb", false), [4]);
        assert_eq!(p.encode("aba", false), [1, 2, 1]);
        assert_eq!(p.encode("a<x>b", false), [1, 5, 2]);
        assert_eq!(p.encode("<s>", false), [0]);
    }

    #[test]
    fn lists_that_contradict_each_other_are_refused() {
        let one = |text: &str, kind| Pieces::new(vec![text.to_owned()], vec![kind], vec![0.0], true);
        assert!(one("a", Kind::Normal).unwrap_err().contains("neither"));
        assert!(one("<0xGG>", Kind::Byte).unwrap_err().contains("byte token"));
        assert!(Pieces::new(vec![], vec![Kind::Normal], vec![], true).unwrap_err().contains("0 scores"));
        assert_eq!(Kind::from_id(6.0), Some(Kind::Byte));
        assert_eq!(Kind::from_id(7.0), None);
    }
}
