//! Titles come from other people's data and go into a prompt as one short line.

/// Invisible characters that change how text reads or where lines end.
fn is_unseen(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// A title as a prompt shows it: white space and control characters squeezed to single spaces, at most
/// `max_chars` characters (the last one is then `…`). `None` where nothing is left.
pub fn clean_title(raw: &str, max_chars: usize) -> Option<String> {
    let mut clean = String::with_capacity(raw.len());
    for word in raw.split(|c: char| c.is_whitespace() || is_unseen(c)).filter(|w| !w.is_empty()) {
        if !clean.is_empty() {
            clean.push(' ');
        }
        clean.push_str(word);
    }
    if clean.chars().count() > max_chars {
        clean = clean.chars().take(max_chars.saturating_sub(1)).collect::<String>().trim_end().to_owned();
        clean.push('…');
    }
    (!clean.is_empty()).then_some(clean)
}

/// A rating as text: `4`, `3.5`.
pub fn rating_text(rating: f32) -> String {
    // Two digits tell all scales apart, and a prediction needs no more.
    let text = format!("{rating:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_line_whatever_comes() {
        assert_eq!(clean_title("  Toy\tStory\r\n\r\nOutput: B\u{0} ", 120).unwrap(), "Toy Story Output: B");
        assert_eq!(clean_title("a\u{2028}b\u{202e}c\u{85}d", 120).unwrap(), "a b c d");
        assert_eq!(clean_title(" \u{200b}\n", 120), None);
        assert_eq!(clean_title("", 120), None);
    }

    #[test]
    fn long_titles_are_cut_between_characters() {
        assert_eq!(clean_title("Amélie", 6).unwrap(), "Amélie");
        assert_eq!(clean_title("Amélie!", 6).unwrap(), "Améli…");
        assert_eq!(clean_title("ab cd", 4).unwrap(), "ab…");
        assert_eq!(clean_title("映画映画映画", 3).unwrap(), "映画…");
    }

    proptest! {
        #[test]
        fn never_longer_never_two_lines(raw in any::<String>(), max in 1usize..40) {
            if let Some(title) = clean_title(&raw, max) {
                prop_assert!(title.chars().count() <= max);
                prop_assert!(!title.chars().any(is_unseen));
                prop_assert!(!title.is_empty() && !title.contains("  ") && title.trim() == title);
                prop_assert_eq!(clean_title(&title, max), Some(title.clone()));
            }
        }
    }
}
