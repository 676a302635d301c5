//! Special tokens in text: finding them, and cutting a text at them.

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
    /// Whether it is markup that text for people leaves out; `<think>` and its kind are not.
    pub hidden: bool,
}

/// Whether a token that a tokenizer does not call special is one all the same, since foreign text must not write it:
/// `<tool_call>`, `</think>`. Others (runs of white space, words) are how plain text is cut.
pub fn is_markup(text: &str) -> bool {
    text.starts_with('<') && text.ends_with('>') && text.chars().nth(2).is_some()
}

/// A stretch of text.
#[derive(Debug, PartialEq)]
pub enum Piece<'a> {
    /// A special token.
    Special(u32),
    /// Text between, never empty.
    Text(&'a str),
}

/// Splits at special tokens: the leftmost one, of those that start there the longest.
pub fn split_special<'a>(text: &'a str, special: &[SpecialToken]) -> Vec<Piece<'a>> {
    // By first byte, so that most places of a text are passed with one look.
    let mut by_first: Vec<Vec<&SpecialToken>> = vec![Vec::new(); 256];
    for token in special.iter().filter(|t| !t.text.is_empty()) {
        by_first[usize::from(token.text.as_bytes()[0])].push(token);
    }
    for tokens in &mut by_first {
        tokens.sort_by_key(|t| std::cmp::Reverse(t.text.len()));
    }
    let bytes = text.as_bytes();
    let mut pieces = Vec::new();
    let (mut start, mut at) = (0, 0);
    while at < bytes.len() {
        let rest = &bytes[at..];
        let candidates = &by_first[usize::from(bytes[at])];
        let Some(token) = candidates.iter().find(|t| rest.starts_with(t.text.as_bytes())) else {
            at += 1;
            continue;
        };
        let before = &text[start..at];
        let before = if token.lstrip { before.trim_end() } else { before };
        if !before.is_empty() {
            pieces.push(Piece::Text(before));
        }
        pieces.push(Piece::Special(token.id));
        at += token.text.len();
        if token.rstrip {
            at = text.len() - text[at..].trim_start().len();
        }
        start = at;
    }
    if start < text.len() {
        pieces.push(Piece::Text(&text[start..]));
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_token_wins_and_white_space_goes_where_asked() {
        let token =
            |id, text: &str| SpecialToken { id, text: text.to_owned(), lstrip: false, rstrip: false, hidden: true };
        let mut special = vec![token(0, "<a>"), token(1, "<a>b")];
        let pieces = split_special("x <a>b<a> y", &special);
        assert_eq!(pieces, [Piece::Text("x "), Piece::Special(1), Piece::Special(0), Piece::Text(" y")]);
        special[0].rstrip = true;
        special[1].lstrip = true;
        let pieces = split_special("x <a>b<a> y", &special);
        assert_eq!(pieces, [Piece::Text("x"), Piece::Special(1), Piece::Special(0), Piece::Text("y")]);
    }
}
