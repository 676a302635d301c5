//! Mistakes in a pipeline file, shown at their place.
//!
//! In: what is wrong, where, and the way out. Out: text with file, line and caret, and one
//! [`Error`] (exit 78) that holds all mistakes of a file, not the first.

use std::fmt::Write as _;
use std::ops::Range;

use annotate_snippets::{Annotation, AnnotationKind, Group, Level, Renderer, Snippet};

use super::document::Origin;
use crate::error::Error;

/// So many mistakes are shown in full; the rest is counted.
const SHOWN: usize = 40;

/// The pipeline file's text and the name that its messages show.
#[derive(Clone, Debug)]
pub struct SourceText {
    /// The path as the user typed it.
    pub name: String,
    /// The whole text.
    pub text: String,
}

/// A place and what to say there.
#[derive(Clone, Debug)]
pub struct Label {
    /// The place.
    pub origin: Origin,
    /// A few words beside the caret; may be empty.
    pub text: String,
}

/// One mistake.
#[derive(Clone, Debug)]
pub struct Diagnostic {
    /// What is wrong; names the key in backticks.
    pub message: String,
    /// Where; the first label is the mistake, the others explain it.
    pub labels: Vec<Label>,
    /// The way out, a line each.
    pub help: Vec<String>,
}

impl Diagnostic {
    /// A mistake at a place, with a few words beside the caret.
    pub fn new(message: impl Into<String>, origin: Origin, label: impl Into<String>) -> Self {
        let labels = vec![Label { origin, text: label.into() }];
        Diagnostic { message: message.into(), labels, help: Vec::new() }
    }

    /// Adds another place.
    pub fn also(mut self, origin: Origin, label: impl Into<String>) -> Self {
        self.labels.push(Label { origin, text: label.into() });
        self
    }

    /// Adds a way out.
    pub fn with_help(mut self, help: impl Into<String>) -> Self {
        self.help.push(help.into());
        self
    }

    /// Adds what [`suggest`] found: the near name beside the caret, else all names as help.
    pub fn with_suggestion<'a>(mut self, typed: &str, names: impl IntoIterator<Item = &'a str>, what: &str) -> Self {
        let names: Vec<&str> = names.into_iter().collect();
        match (suggest(typed, names.iter().copied()), names.is_empty()) {
            (Some(near), _) => {
                if let Some(first) = self.labels.first_mut() {
                    first.text = format!("did you mean `{near}`?");
                }
                self
            }
            (None, false) => self.with_help(format!("{what}: {}", list(names))),
            (None, true) => self,
        }
    }

    /// The mistake with file, line and caret; ANSI colours where `colour`.
    pub fn render(&self, source: &SourceText, colour: bool) -> String {
        // One snippet per text: the file, and each argument that a label points to.
        let mut snippets: Vec<(&str, Option<&str>, Vec<Annotation<'_>>)> = Vec::new();
        for (i, label) in self.labels.iter().enumerate() {
            let (text, name, span) = match &label.origin {
                Origin::File(span) => (source.text.as_str(), Some(source.name.as_str()), span),
                Origin::Argument { text, span } => (text.as_ref(), None, span),
            };
            let kind = if i == 0 { AnnotationKind::Primary } else { AnnotationKind::Context };
            let mut annotation = kind.span(within(text, span));
            if !label.text.is_empty() {
                annotation = annotation.label(label.text.as_str());
            }
            match snippets.iter_mut().find(|(t, n, _)| *t == text && *n == name) {
                Some((_, _, annotations)) => annotations.push(annotation),
                None => snippets.push((text, name, vec![annotation])),
            }
        }
        let mut group = Group::with_title(Level::ERROR.primary_title(self.message.as_str()));
        for (text, name, annotations) in snippets {
            let snippet = Snippet::source(text).path(name).line_numbering(name.is_some()).annotations(annotations);
            group = group.element(snippet);
        }
        group = group.elements(self.help.iter().map(|h| Level::HELP.message(h.as_str())));
        let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
        let rendered = renderer.render(&[group]);
        // The renderer pads some lines; trailing blanks are of no use to anyone.
        rendered.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
    }
}

/// `span` cut to the text, to one line and to whole characters, since the renderer insists on them.
fn within(text: &str, span: &Range<usize>) -> Range<usize> {
    let floor = |mut i: usize| {
        i = i.min(text.len());
        while !text.is_char_boundary(i) {
            i -= 1;
        }
        i
    };
    let start = floor(span.start);
    let end = floor(span.end).max(start);
    let line_end = text[start..end].find(['\n', '\r']).map_or(end, |n| start + n);
    start..line_end
}

/// One error (exit 78) that shows all mistakes, from the file's top to its bottom.
pub fn into_error(mut found: Vec<Diagnostic>, source: &SourceText, colour: bool) -> Error {
    found.sort_by_key(|d| d.labels.first().map(|l| l.origin.order()));
    let count = match found.len() {
        1 => "1 mistake".to_owned(),
        n => format!("{n} mistakes"),
    };
    let mut message = format!("{} has {count}; nothing ran", source.name);
    for diagnostic in found.iter().take(SHOWN) {
        // Writing to a String cannot fail.
        let _ = write!(message, "\n\n{}", diagnostic.render(source, colour));
    }
    if found.len() > SHOWN {
        let _ = write!(message, "\n\n... and {} more", found.len() - SHOWN);
    }
    Error::spec(message)
}

/// The name that `typed` was probably meant to be: few letters away, or one the beginning or a
/// part of the other. `None` where nothing is near.
pub fn suggest<'a>(typed: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let simple = |s: &str| s.to_lowercase().replace('-', "_");
    let typed = simple(typed);
    let letters = typed.chars().count();
    let score = |name: &str| {
        let name = simple(name);
        let distance = strsim::damerau_levenshtein(&typed, &name);
        let longest = letters.max(name.chars().count());
        if distance <= (longest / 3).max(1) && distance < longest {
            return Some(distance);
        }
        // Worse than any near spelling, better than nothing.
        let part = letters >= 4 && name.contains(&typed) || name.chars().count() >= 4 && typed.contains(&name);
        part.then_some(1000 + distance)
    };
    names.into_iter().filter_map(|n| score(n).map(|s| (s, n))).min_by_key(|(s, _)| *s).map(|(_, n)| n)
}

/// Names in backticks with commas.
pub fn list<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    names.into_iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_names() {
        let keys = ["layers", "embedding_dim", "learning_rate", "seed"];
        assert_eq!(suggest("layer", keys), Some("layers"));
        assert_eq!(suggest("embeding-dim", keys), Some("embedding_dim"));
        assert_eq!(suggest("Seed", keys), Some("seed"));
        assert_eq!(suggest("embedding", keys), Some("embedding_dim"));
        assert_eq!(suggest("temperature", keys), None);
        assert_eq!(suggest("x", ["y"]), None, "one letter is not near another one");
    }

    #[test]
    fn spans_are_cut_to_one_line_and_whole_characters() {
        let text = "a = \"é\"\nb";
        assert_eq!(within(text, &(4..20)), 4..8);
        assert_eq!(within(text, &(6..7)), 5..7, "inside of é");
        assert_eq!(within(text, &(100..200)), 10..10);
        assert_eq!(within("", &(0..1)), 0..0);
    }

    #[test]
    fn many_mistakes_are_counted() {
        let source = SourceText { name: "p.toml".into(), text: "name = 1\n".into() };
        let one = Diagnostic::new("wrong", Origin::File(7..8), "here");
        let text = into_error(vec![one; SHOWN + 2], &source, false).message;
        assert!(text.starts_with("p.toml has 42 mistakes"), "{text}");
        assert!(text.ends_with("... and 2 more"), "{text}");
    }
}
