//! From whatever a server's LLM wrote to an order of the candidates that were shown.
//!
//! In: any text, the titles as shown. Out: places (0-based, in the order shown), best first, none of them twice, or
//! nothing where the text is too broken. What comes out is always about the candidates: an item that the text invents
//! is dropped, and [`complete`] appends what it forgot.

use serde_json::Value;

/// Bytes of a text that are read.
const TEXT_BYTES: usize = 64 << 10;
/// Entries of a list that are read.
const ENTRIES: usize = 256;
/// Characters of an entry that are read.
const ENTRY_CHARS: usize = 300;
/// How alike (0 to 1, Damerau-Levenshtein) a misspelt title must be to the candidate's.
const ALIKE: f64 = 0.85;
/// By how much it must be more alike than the next candidate.
const APART: f64 = 0.1;

/// The candidates that a text names, best first; `None` where it names none, or more lines that are none than are.
///
/// An entry names a candidate by its title (ignoring case, punctuation at the ends and numbering), by its letter where
/// `letters` says that the prompt had them, by its number, or by a title that is misspelt or cut, if only one
/// candidate is meant by it. Repeats are dropped.
pub fn order(text: &str, titles: &[String], letters: bool) -> Option<Vec<usize>> {
    let text = head(text, TEXT_BYTES);
    let known: Vec<String> = titles.iter().map(|t| plain(t)).collect();
    let mut best: Option<(Vec<usize>, usize)> = None;
    // The first way of cutting the text into entries that reads well; else the one that names the most.
    for entries in ways(text) {
        let (named, broken) = read(&entries, &known, letters);
        if named.is_empty() || broken > named.len() + 1 {
            continue;
        }
        if broken == 0 && named.len() == titles.len() {
            return Some(named);
        }
        if best.as_ref().is_none_or(|(so_far, _)| named.len() > so_far.len()) {
            best = Some((named, broken));
        }
    }
    best.map(|(named, _)| named)
}

/// All candidates: those that were named, then the rest by `places`, the recommender's places as shown.
pub fn complete(named: &[usize], places: &[u32]) -> Vec<usize> {
    let mut all: Vec<usize> = Vec::with_capacity(places.len());
    let mut seen = vec![false; places.len()];
    for &place in named {
        if let Some(seen) = seen.get_mut(place)
            && !std::mem::replace(seen, true)
        {
            all.push(place);
        }
    }
    let mut rest: Vec<usize> = (0..places.len()).filter(|&p| !seen[p]).collect();
    rest.sort_by_key(|&p| (places[p], p));
    all.extend(rest);
    all
}

/// Ways to cut a text into entries, the strictest first.
fn ways(text: &str) -> Vec<Vec<String>> {
    let mut ways = Vec::new();
    if let Some(list) = json_list(text) {
        ways.push(list);
    }
    if text.contains('[') {
        ways.push(literals(text));
    }
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).take(ENTRIES).collect();
    ways.push(lines.iter().map(|l| (*l).to_owned()).collect());
    for separators in [[';', '>', '|'].as_slice(), &[','], &[' ']] {
        if text.contains(separators) {
            let pieces = lines.iter().flat_map(|l| l.split(separators)).map(str::trim).filter(|p| !p.is_empty());
            let pieces: Vec<String> = pieces.take(ENTRIES).map(str::to_owned).collect();
            // Words are no entries, letters are: `C A B`.
            if separators != [' '] || pieces.iter().all(|p| p.len() <= 3 && !p.contains('.')) {
                ways.push(pieces);
            }
        }
    }
    ways
}

/// The first list of strings or numbers in the first JSON value of a text.
fn json_list(text: &str) -> Option<Vec<String>> {
    let start = text.find(['{', '['])?;
    let value = serde_json::Deserializer::from_str(&text[start..]).into_iter::<Value>().next()?.ok()?;
    list_in(&value)
}

fn list_in(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::Array(items) => {
            let words: Vec<String> = items.iter().take(ENTRIES).filter_map(word).collect();
            if words.is_empty() { items.iter().find_map(list_in) } else { Some(words) }
        }
        Value::Object(fields) => fields.values().find_map(list_in),
        _ => None,
    }
}

fn word(value: &Value) -> Option<String> {
    match value {
        Value::String(s) => Some(s.clone()),
        Value::Number(n) => Some(n.to_string()),
        Value::Object(fields) => ["title", "item", "name", "letter", "label", "id"]
            .iter()
            .find_map(|key| fields.get(*key).filter(|v| !v.is_object()).and_then(word)),
        _ => None,
    }
}

/// String literals after the first bracket, for JSON that was cut off.
fn literals(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = text.find('[').map_or("", |at| &text[at..]);
    while let Some(open) = rest.find('"') {
        let inside = &rest[open + 1..];
        let mut escaped = false;
        let close = inside.char_indices().find(|&(_, c)| {
            let ends = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        let Some((close, _)) = close else { break };
        let quoted = &rest[open..open + close + 2];
        found.push(serde_json::from_str(quoted).unwrap_or_else(|_| inside[..close].to_owned()));
        rest = &inside[close + 1..];
        if found.len() == ENTRIES {
            break;
        }
    }
    found
}

/// The candidates that entries name, and how many entries name none.
fn read(entries: &[String], known: &[String], letters: bool) -> (Vec<usize>, usize) {
    let mut named = Vec::new();
    let mut taken = vec![false; known.len()];
    let mut broken = 0;
    for entry in entries {
        match meant(entry, known, letters, &taken) {
            Some(place) if !taken[place] => {
                taken[place] = true;
                named.push(place);
            }
            Some(_) => {}
            None => broken += 1,
        }
    }
    (named, broken)
}

/// The one candidate that an entry means.
fn meant(entry: &str, known: &[String], letters: bool, taken: &[bool]) -> Option<usize> {
    let entry: String = entry.chars().take(ENTRY_CHARS).collect();
    let whole = plain(&entry);
    if whole.is_empty() {
        return None;
    }
    if let Some(place) = titled(&whole, known, taken) {
        return Some(place);
    }
    let (mark, rest) = marker(&entry);
    let rest = plain(rest);
    let by_title =
        (!rest.is_empty()).then(|| titled(&rest, known, taken).or_else(|| resembling(&rest, known))).flatten();
    let by_mark = mark.and_then(|m| m.place(letters)).filter(|&p| p < known.len());
    match (mark, rest.is_empty()) {
        // Nothing but a mark: it is the name.
        (Some(_), true) => by_mark,
        // A letter and a title have to agree; a number before a title only counts lines.
        (Some(Mark::Letter(_)), false) if letters => match (by_mark, by_title) {
            (Some(a), Some(b)) if a != b => None,
            (_, Some(b)) => Some(b),
            _ => None,
        },
        // `3. B` counts lines too.
        (Some(Mark::Number(_)), false) if letters && rest.len() == 1 => meant(&rest, known, letters, taken),
        (Some(_), false) => by_title.or_else(|| resembling(&whole, known)),
        (None, _) => resembling(&whole, known),
    }
}

/// The candidate of exactly this title; of several, the first that was not named yet.
fn titled(title: &str, known: &[String], taken: &[bool]) -> Option<usize> {
    let mut same = (0..known.len()).filter(|&p| known[p] == title);
    let first = same.next()?;
    if taken[first] { same.find(|&p| !taken[p]).or(Some(first)) } else { Some(first) }
}

/// The only candidate whose title an entry could be: cut short, with something added, or misspelt.
fn resembling(entry: &str, known: &[String]) -> Option<usize> {
    let length = entry.chars().count();
    let borders = |c: Option<char>| !c.is_some_and(char::is_alphanumeric);
    let mostly = |longer: &str, shorter: &str| 2 * shorter.chars().count() >= longer.chars().count();
    // A title without its year, or with half of it gone.
    let cut = |title: &str| {
        title
            .strip_prefix(entry)
            .is_some_and(|rest| rest.starts_with(" (") || (borders(rest.chars().next()) && mostly(title, entry)))
    };
    let holds = |title: &str| {
        mostly(entry, title)
            && entry.match_indices(title).any(|(at, found)| {
                borders(entry[..at].chars().next_back()) && borders(entry[at + found.len()..].chars().next())
            })
    };
    let mut parts =
        (0..known.len()).filter(|&p| length >= 3 && !known[p].is_empty() && (cut(&known[p]) || holds(&known[p])));
    match (parts.next(), parts.next()) {
        (Some(only), None) => return Some(only),
        (Some(_), Some(_)) => return None,
        _ => {}
    }
    let (mut first, mut second) = ((0.0, None), 0.0);
    for (place, title) in known.iter().enumerate() {
        let other = title.chars().count();
        // More letters apart than may be: not worth the table.
        if (length.abs_diff(other) as f64) > (1.0 - ALIKE + APART) * length.max(other) as f64 {
            continue;
        }
        let alike = strsim::normalized_damerau_levenshtein(entry, title);
        if alike > first.0 {
            second = first.0;
            first = (alike, Some(place));
        } else if alike > second {
            second = alike;
        }
    }
    first.1.filter(|_| first.0 >= ALIKE && second <= first.0 - APART)
}

/// What stands before a title.
#[derive(Clone, Copy)]
enum Mark {
    Letter(usize),
    /// As written, 1 is the first.
    Number(usize),
}

impl Mark {
    fn place(self, letters: bool) -> Option<usize> {
        match self {
            Mark::Letter(place) => letters.then_some(place),
            Mark::Number(n) => n.checked_sub(1),
        }
    }
}

/// `A. Alien`, `(A) Alien`, `12) Alien`, `A`, `7`: the mark, and what follows.
fn marker(entry: &str) -> (Option<Mark>, &str) {
    let entry = entry.trim_matches(|c: char| c.is_whitespace() || "*-•\"'`([{#".contains(c));
    let end = entry.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(entry.len());
    let (head, rest) = entry.split_at(end);
    // "A Bug's Life" begins with no letter of a list.
    if !rest.is_empty() && !rest.starts_with(['.', ')', ':', ']', '}', '-', '"', '\'', '`', '*']) {
        return (None, entry);
    }
    let mark = match head.len() {
        1 if head.as_bytes()[0].is_ascii_alphabetic() => {
            Some(Mark::Letter(usize::from(head.as_bytes()[0].to_ascii_uppercase() - b'A')))
        }
        1..=3 => head.parse().ok().map(Mark::Number),
        _ => None,
    };
    match mark {
        Some(_) => (mark, rest.trim_start_matches(|c: char| c.is_whitespace() || ".):]}-\"'`*".contains(c))),
        None => (None, entry),
    }
}

/// A title for comparison: lower case, single spaces, no punctuation at the ends.
fn plain(text: &str) -> String {
    let text = text.trim_matches(|c: char| c.is_whitespace() || "\"'`*_.,;:-•".contains(c));
    let mut plain = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        if !plain.is_empty() {
            plain.push(' ');
        }
        plain.extend(word.chars().flat_map(char::to_lowercase));
    }
    plain
}

/// The beginning of a text, at most `bytes` long, ending between characters.
pub(super) fn head(text: &str, bytes: usize) -> &str {
    let mut end = bytes.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn titles() -> Vec<String> {
        [
            "Alien (1979)",
            "Aliens (1986)",
            "Good, the Bad and the Ugly, The (1966)",
            "A Bug's Life (1998)",
            "1984 (1984)",
        ]
        .map(str::to_owned)
        .to_vec()
    }

    fn read_letters(text: &str) -> Option<Vec<usize>> {
        order(text, &titles(), true)
    }

    fn read_titles(text: &str) -> Option<Vec<usize>> {
        order(text, &titles(), false)
    }

    #[test]
    fn lists_in_many_forms() {
        for text in [
            "C\nA\nB",
            "C, A, B",
            "C > A > B",
            "1. C\n2. A\n3. B",
            "(C) (A) (B)",
            "{\"ranking\": [\"C\", \"A\", \"B\"]}",
            "```json\n[\"C\", \"A\", \"B\"]\n```",
            "{\"ranking\": [\"C\", \"A\", \"B\", ",
            "C. Good, the Bad and the Ugly, The (1966)\nA. Alien (1979)\nB. Aliens (1986)",
            "Here is my ranking:\nC\nA\nB",
            "[{\"letter\": \"C\"}, {\"letter\": \"A\"}, {\"letter\": \"B\"}]",
            "[3, 1, 2]",
            "C\nC\nA\nC\nB\nA",
        ] {
            assert_eq!(read_letters(text).as_deref(), Some(&[2, 0, 1][..]), "{text:?}");
        }
    }

    #[test]
    fn titles_exact_cut_and_misspelt() {
        for text in [
            "Good, the Bad and the Ugly, The (1966)\nAlien (1979)\nAliens (1986)",
            "1. good, the bad and the ugly, the (1966)\n2. ALIEN (1979)\n3. aliens  (1986)",
            "- \"Good, the Bad and the Ugly, The\"\n- \"Alien (1979)\"\n- \"Aliens (1986)\"",
            "{\"ranking\":[\"Good, teh Bad and the Ugly, The (1966)\",\"Alien\",\"Aliens\"]}",
            "Good, the Bad and the Ugly, The (1966); Alien (1979); Aliens (1986)",
        ] {
            assert_eq!(read_titles(text).as_deref(), Some(&[2, 0, 1][..]), "{text:?}");
        }
        assert_eq!(read_titles("A Bug's Life\n1984 (1984)"), Some(vec![3, 4]));
    }

    #[test]
    fn what_is_ambiguous_names_nobody() {
        let twins = ["Star Wars (1977)".to_owned(), "Star Wars (1997)".to_owned()];
        assert_eq!(order("Star Wars", &twins, false), None);
        assert_eq!(order("Star Wars (1987)", &twins, false), None);
        // The letter of one and the title of another.
        assert_eq!(read_letters("A. Aliens (1986)"), None);
        // The same title twice: both are named, in turn.
        let same = ["Hamlet".to_owned(), "Hamlet".to_owned()];
        assert_eq!(order("Hamlet\nHamlet", &same, false), Some(vec![0, 1]));
    }

    #[test]
    fn what_is_no_answer_is_none() {
        for text in [
            "",
            "\n\n",
            "I'm sorry, I can't help with that.",
            "{}",
            "[[[[]]]]",
            "Casablanca\nVertigo\nPsycho\nRear Window",
            "Alien (1979)\nCasablanca\nVertigo\nPsycho",
            "null",
            "99\n100",
        ] {
            assert_eq!(read_titles(text), None, "{text:?}");
        }
    }

    #[test]
    fn invented_items_are_dropped() {
        assert_eq!(read_titles("Casablanca (1942)\nAliens (1986)\nAlien (1979)"), Some(vec![1, 0]));
    }

    #[test]
    fn what_was_forgotten_comes_in_the_recommenders_order() {
        assert_eq!(complete(&[2, 0], &[4, 1, 5, 2, 3]), [2, 0, 1, 3, 4]);
        assert_eq!(complete(&[9, 1, 1], &[2, 3, 1]), [1, 2, 0]);
        assert_eq!(complete(&[], &[]), [0usize; 0]);
    }

    proptest! {
        #[test]
        fn any_text_gives_places_of_candidates(text in any::<String>(), letters in any::<bool>()) {
            let titles = titles();
            if let Some(order) = order(&text, &titles, letters) {
                let mut sorted = order.clone();
                sorted.sort_unstable();
                sorted.dedup();
                prop_assert!(!order.is_empty() && sorted.len() == order.len());
                prop_assert!(order.iter().all(|&p| p < titles.len()));
            }
        }
    }
}
