//! A model's chat template: Jinja with the settings and methods that transformers uses, and with an end.
//!
//! In: the template's source and messages. Out: text. A template is part of a model file, and nobody reads those: one that loops,
//! grows or nests without end is stopped, by a budget that grows with the messages.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Value, ValueKind};
use minijinja::{Environment, ErrorKind, State};

use super::chat::Message;

/// A compiled template and the texts of its tokens.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos: String,
    eos: String,
}

/// Name of the template inside its environment.
const TEMPLATE: &str = "chat";

/// Work that a template may do in one rendering, whatever the messages: an instruction or 64 bytes of text each.
/// A template is part of a model file, and may be made to loop or to grow without end.
const FUEL: usize = 100_000;

/// Further work for each message; and for each of its bytes 1, so that a text may pass through 64 operations.
const FUEL_PER_MESSAGE: usize = 1_000;

/// Work at most, however long the messages are: texts of megabytes fit.
const MOST_FUEL: usize = 4_000_000;

/// Calls inside calls.
const RECURSION: usize = 100;

/// Bytes of stack for each piece of work: values may be nested as deep as there is work to nest them, and are printed
/// and dropped by recursion. Only touched pages cost memory.
const STACK_PER_FUEL: usize = 512;

/// Bytes of stack for compiling, where nesting is bounded by the library.
const COMPILE_STACK: usize = 16 << 20;

impl ChatTemplate {
    /// Compiles a template; `bos` and `eos` are how it will write those tokens.
    ///
    /// # Errors
    /// In words, where it is no valid Jinja, or uses a namespace as a value.
    pub fn compile(source: String, bos: String, eos: String) -> Result<Self, String> {
        check_namespaces(&source)?;
        stacker::grow(COMPILE_STACK, || Self::compile_here(source, bos, eos))
    }

    /// The texts of the tokens that begin and end a text; empty where the model has none.
    pub fn bos_and_eos(&self) -> [&str; 2] {
        [&self.bos, &self.eos]
    }

    /// The template as it was written.
    pub fn source(&self) -> &str {
        &self.source
    }

    fn compile_here(source: String, bos: String, eos: String) -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| e.to_string())?);
        environment.set_unknown_method_callback(python_method);
        environment.set_recursion_limit(RECURSION);
        // It shows the values of all names, which is for authors.
        environment.remove_global("debug");
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned(TEMPLATE, source.clone()).map_err(|e| e.to_string())?;
        Ok(ChatTemplate { environment, source, bos, eos })
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// In words, where the template refuses the messages, or does too much for them.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, String> {
        let bytes: usize = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
        let mut environment = self.environment.clone();
        let fuel = (FUEL + messages.len() * FUEL_PER_MESSAGE + bytes).min(MOST_FUEL);
        environment.set_fuel(Some(fuel as u64));
        let template = environment.get_template(TEMPLATE).map_err(|e| e.to_string())?;
        let pair = |m: &Message| Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())]);
        let context = minijinja::context! {
            messages => messages.iter().map(pair).collect::<Vec<Value>>(),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        stacker::grow(fuel * STACK_PER_FUEL, || template.render(context).map_err(|e| e.to_string()))
    }
}

/// Methods of Python's strings and dicts that chat templates call.
fn python_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, minijinja::Error> {
    let unknown = || minijinja::Error::new(ErrorKind::UnknownMethod, format!("`{method}` is not supported"));
    if let Some(text) = value.as_str() {
        let argument = args.first().and_then(Value::as_str);
        let set: Vec<char> = argument.unwrap_or_default().chars().collect();
        let cut = |c: char| if argument.is_some() { set.contains(&c) } else { c.is_whitespace() };
        return Ok(match (method, argument) {
            ("strip", _) => Value::from(text.trim_matches(cut)),
            ("lstrip", _) => Value::from(text.trim_start_matches(cut)),
            ("rstrip", _) => Value::from(text.trim_end_matches(cut)),
            ("upper", _) => Value::from(text.to_uppercase()),
            ("lower", _) => Value::from(text.to_lowercase()),
            ("startswith", Some(prefix)) => Value::from(text.starts_with(prefix)),
            ("endswith", Some(suffix)) => Value::from(text.ends_with(suffix)),
            ("split", Some(separator)) if args.len() == 1 && !separator.is_empty() => {
                state.consume_fuel(text.matches(separator).count() as u64)?;
                Value::from(text.split(separator).map(str::to_owned).collect::<Vec<_>>())
            }
            ("replace", Some(from)) => match args.get(1).and_then(Value::as_str) {
                Some(to) => {
                    // Paid before it is made: the result may be as long as the product of both.
                    let made = text.matches(from).count().saturating_mul(to.len()) + text.len();
                    state.consume_fuel(made as u64 / 64)?;
                    Value::from(text.replace(from, to))
                }
                None => return Err(unknown()),
            },
            _ => return Err(unknown()),
        });
    }
    match (value.kind(), method) {
        (ValueKind::Map, "items") => state.apply_filter("items", std::slice::from_ref(value)),
        (ValueKind::Map, "get") => {
            let key = args.first().ok_or_else(unknown)?;
            let found = value.get_item(key)?;
            Ok(if found.is_undefined() { args.get(1).cloned().unwrap_or(Value::from(())) } else { found })
        }
        _ => Err(unknown()),
    }
}

/// Refuses templates that could put a namespace into itself, which printing would follow without end.
/// Namespaces are the only values that change, and every use that is meant is `name.field`. So `namespace(...)` may only stand behind
/// `set name =`, and such a name only before a dot.
fn check_namespaces(source: &str) -> Result<(), String> {
    let words = words(source);
    let mut names = Vec::new();
    for (i, word) in words.iter().enumerate().filter(|(_, w)| w.text == "namespace") {
        let made = word.after == Some('(') && i >= 2 && words[i - 1].after == Some('=') && words[i - 2].text == "set";
        if !made {
            return Err("`namespace(...)` is supported behind `set name =` only".to_owned());
        }
        names.push(words[i - 1].text);
    }
    // A name may be given away before it becomes a namespace's in a loop, so all places count.
    for (i, word) in words.iter().enumerate().filter(|(_, w)| names.contains(&w.text)) {
        let field = word.before == Some('.');
        let made = i > 0 && words[i - 1].text == "set" && word.after == Some('=');
        if !(word.after == Some('.') || made || field) {
            return Err(format!("the namespace `{}` is used as a value; only its fields can be", word.text));
        }
    }
    Ok(())
}

/// A word of the template's code, and the signs beside it, white space apart.
struct Word<'a> {
    text: &'a str,
    before: Option<char>,
    after: Option<char>,
}

/// The words of what stands in `{{ }}` and `{% %}`, outside quotes.
fn words(source: &str) -> Vec<Word<'_>> {
    let mut out: Vec<Word<'_>> = Vec::new();
    let mut rest = source;
    while let Some(open) = rest.find("{{").into_iter().chain(rest.find("{%")).chain(rest.find("{#")).min() {
        let comment = rest[open..].starts_with("{#");
        rest = &rest[open + 2..];
        if comment {
            rest = rest.find("#}").map_or("", |end| &rest[end + 2..]);
            continue;
        }
        let mut before = None;
        let mut unfinished = None;
        while let Some(c) = rest.chars().next() {
            let word = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
            if word > 0 {
                out.push(Word { text: &rest[..word], before, after: None });
                unfinished = Some(out.len() - 1);
                (before, rest) = (None, &rest[word..]);
                continue;
            }
            if rest.starts_with("}}") || rest.starts_with("%}") {
                break;
            }
            if !c.is_whitespace() {
                if let Some(word) = unfinished.take() {
                    // `==` is no assignment.
                    out[word].after = if rest.starts_with("==") { None } else { Some(c) };
                }
                before = Some(c);
            }
            rest = &rest[c.len_utf8()..];
            if c == '"' || c == '\'' {
                let mut escaped = false;
                let end = rest.char_indices().find(|(_, d)| {
                    let ends = *d == c && !escaped;
                    escaped = *d == '\\' && !escaped;
                    ends
                });
                rest = end.map_or("", |(at, _)| &rest[at + 1..]);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_are_fields_only() {
        for good in [
            "{%- set ns = namespace(found=false) -%}{% if not ns.found and x == 'ns' %}{% set ns.found = true %}{% endif %}ns",
            "{# ns #}{% set ns=namespace() %}{{ m.ns }}{{ ns . x }}{% set namespaces = 1 %} namespace(",
            "{% set x = 1 %}{{ x }}",
        ] {
            check_namespaces(good).unwrap();
            ChatTemplate::compile(good.to_owned(), String::new(), String::new()).unwrap();
        }
        for bad in [
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
            "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns.x }}",
            "{% set ns = namespace() %}{% set b = ns %}",
            "{% set ns = namespace() %}{% if ns == 1 %}{% endif %}",
            "{% set f = namespace %}",
            "{{ namespace() }}",
            "{% set ns.x = namespace() %}",
            "{% for x in [namespace()] %}{% set x.x = x %}{{ x }}{% endfor %}",
        ] {
            assert!(check_namespaces(bad).unwrap_err().contains("namespace"), "{bad}");
        }
    }

    #[test]
    fn values_nested_without_end_are_stopped_before_the_stack_is() {
        let source = "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% for j in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}";
        let shown =
            "{% set ns = namespace(x=1) %}{% for i in range(12000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}";
        for source in [source, shown] {
            let template = ChatTemplate::compile(source.to_owned(), String::new(), String::new()).unwrap();
            // Whether it comes to an end or not: the process goes on.
            let _ = template.render(&[Message::new("user", "a".repeat(1 << 20))], true);
            let _ = template.render(&[Message::new("user", "a")], true);
        }
    }
}
