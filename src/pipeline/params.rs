//! `[params]`, `--param k=v`, and `{{ k }}` in the strings of the file.
//!
//! In: the tree and the `--param` arguments. Out: the parameters' values, and the tree with
//! every template rendered (minijinja, undefined names are errors).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior};
use serde_json::Value;

use super::diagnostics::{Diagnostic, list};
use super::document::{Item, ItemValue, Origin};

/// The parameters of a run.
#[derive(Clone, Debug, Default)]
pub struct Params {
    /// Name -> string, number or boolean.
    pub values: BTreeMap<String, Value>,
    /// Declared as required and not given; reported once, where declared.
    missing: BTreeSet<String>,
}

/// Reads `[params]` and lays the `--param` arguments over it.
pub fn read_params(root: &Item, given: &[(String, String)], out: &mut Vec<Diagnostic>) -> Params {
    let mut params = Params::default();
    let mut declared: BTreeMap<String, Declared> = BTreeMap::new();
    for entry in root.get("params").map(Item::entries).unwrap_or_default() {
        if !is_name(&entry.key) {
            out.push(
                Diagnostic::new(format!("`{}` cannot be a parameter's name", entry.key), entry.key_origin.clone(), "")
                    .with_help("names have letters, digits and `_`, and begin with a letter or `_`"),
            );
            continue;
        }
        match declaration(&entry.key, &entry.item) {
            Ok(default) => {
                let place = entry.key_origin.clone();
                declared.insert(entry.key.clone(), Declared { default, place });
            }
            Err(mistake) => out.push(mistake),
        }
    }
    let mut values: BTreeMap<&str, Value> = BTreeMap::new();
    for (name, text) in given {
        let argument: Arc<str> = format!("--param {name}={text}").into();
        let start = "--param ".len();
        let value_start = start + name.len() + 1;
        let at = |span| Origin::Argument { text: argument.clone(), span };
        let Some(declaration) = declared.get(name) else {
            out.push(
                Diagnostic::new(
                    format!("the pipeline has no parameter `{name}`"),
                    at(start..start + name.len()),
                    "not declared under [params]",
                )
                .with_suggestion(name, declared.keys().map(String::as_str), "its parameters are"),
            );
            continue;
        };
        match typed(text, declaration.default.as_ref()) {
            Ok(value) => {
                values.insert(name, value);
            }
            Err(wanted) => out.push(
                Diagnostic::new(
                    format!("parameter `{name}` wants {wanted}"),
                    at(value_start..value_start + text.len()),
                    format!("not {wanted}"),
                )
                .also(declaration.place.clone(), format!("its default is {wanted}")),
            ),
        }
    }
    for (name, declaration) in &declared {
        match values.remove(name.as_str()).or_else(|| declaration.default.clone()) {
            Some(value) => {
                params.values.insert(name.clone(), value);
            }
            None => {
                params.missing.insert(name.clone());
                out.push(
                    Diagnostic::new(
                        format!("parameter `{name}` is missing"),
                        declaration.place.clone(),
                        "required, it has no default",
                    )
                    .with_help(format!("give it on the command line: `--param {name}=VALUE`")),
                );
            }
        }
    }
    params
}

struct Declared {
    /// `None`: required.
    default: Option<Value>,
    place: Origin,
}

/// A parameter's default, or `None` where it is `{ required = true }`.
fn declaration(name: &str, item: &Item) -> Result<Option<Value>, Diagnostic> {
    let wrong = |item: &Item| {
        Diagnostic::new(
            format!("parameter `{name}` is {}", item.type_name()),
            item.origin.clone(),
            "expected a string, a number, a boolean or `{ required = true }`",
        )
    };
    match &item.value {
        ItemValue::String(_)
        | ItemValue::Integer(_)
        | ItemValue::Float(_)
        | ItemValue::Boolean(_)
        | ItemValue::Datetime(_) => Ok(Some(item.to_json())),
        ItemValue::Table(entries) => match entries.as_slice() {
            [one] if one.key == "required" && matches!(one.item.value, ItemValue::Boolean(true)) => Ok(None),
            [one] if one.key == "required" => Err(Diagnostic::new(
                format!("parameter `{name}` is neither required nor has a default"),
                one.item.origin.clone(),
                "only `true` has a meaning here",
            )
            .with_help(format!("write `{name} = \"its default\"` for a parameter that may be left out"))),
            _ => Err(wrong(item)),
        },
        ItemValue::Array(_) | ItemValue::Invalid => Err(wrong(item)),
    }
}

/// The text of a `--param` in the type of its default; a required one is a string.
fn typed(text: &str, default: Option<&Value>) -> Result<Value, &'static str> {
    match default {
        Some(Value::Bool(_)) => text.parse::<bool>().map(Value::from).map_err(|_| "a boolean"),
        Some(Value::Number(n)) if n.is_i64() => text.parse::<i64>().map(Value::from).map_err(|_| "an integer"),
        Some(Value::Number(_)) => match text.parse::<f64>() {
            Ok(x) if x.is_finite() => Ok(x.into()),
            _ => Err("a number"),
        },
        _ => Ok(text.into()),
    }
}

fn is_name(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Renders the templates in all strings but those of `[params]`. `file` is the file's text.
pub fn fill(root: &mut Item, params: &Params, file: &str, out: &mut Vec<Diagnostic>) {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    // A multi-line string ends in a newline that is meant.
    if let Ok(syntax) = SyntaxConfig::builder().keep_trailing_newline(true).build() {
        environment.set_syntax(syntax);
    }
    let mut filler = Filler { environment: &environment, params, file, out };
    if let ItemValue::Table(entries) = &mut root.value {
        entries.iter_mut().filter(|e| e.key != "params").for_each(|e| filler.item(&mut e.item));
    }
}

struct Filler<'a> {
    environment: &'a Environment<'a>,
    params: &'a Params,
    file: &'a str,
    out: &'a mut Vec<Diagnostic>,
}

impl Filler<'_> {
    fn item(&mut self, item: &mut Item) {
        match &mut item.value {
            ItemValue::Array(items) => items.iter_mut().for_each(|i| self.item(i)),
            ItemValue::Table(entries) => entries.iter_mut().for_each(|e| self.item(&mut e.item)),
            ItemValue::String(text) if ["{{", "{%", "{#"].iter().any(|d| text.contains(d)) => {
                match self.render(text, &item.origin) {
                    Some(rendered) => {
                        item.raw = Some(rendered.clone());
                        item.value = ItemValue::String(rendered);
                    }
                    None => item.value = ItemValue::Invalid,
                }
            }
            _ => {}
        }
    }

    /// The rendered text; `None` where a mistake was reported.
    fn render(&mut self, text: &str, origin: &Origin) -> Option<String> {
        let template = match self.environment.template_from_str(text) {
            Ok(template) => template,
            Err(e) => {
                self.broken(&e, origin);
                return None;
            }
        };
        let mut names: Vec<String> = template.undeclared_variables(false).into_iter().collect();
        names.retain(|n| !self.params.values.contains_key(n) && !self.environment.globals().any(|(g, _)| g == n));
        names.sort();
        for name in names.iter().filter(|n| !self.params.missing.contains(*n)) {
            let known: Vec<&str> = self.params.values.keys().chain(&self.params.missing).map(String::as_str).collect();
            let mut mistake = Diagnostic::new(
                format!("there is no parameter `{name}`"),
                origin.of_word(name, self.file),
                "not declared under [params]",
            )
            .with_suggestion(name, known.iter().copied(), "the parameters are");
            if known.is_empty() {
                mistake = mistake.with_help(format!("declare it: `[params]` with `{name} = \"its default\"`"));
            }
            self.out.push(mistake);
        }
        if !names.is_empty() {
            return None;
        }
        let values: BTreeMap<String, minijinja::Value> =
            self.params.values.iter().map(|(name, value)| (name.clone(), template_value(value))).collect();
        match template.render(values) {
            Ok(rendered) => Some(rendered),
            Err(e) => {
                self.broken(&e, origin);
                None
            }
        }
    }

    fn broken(&mut self, error: &minijinja::Error, origin: &Origin) {
        let why = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
        let mut help = "a parameter is written `{{ name }}`".to_owned();
        if !self.params.values.is_empty() {
            help = format!("{help}; the parameters are: {}", list(self.params.values.keys().map(String::as_str)));
        }
        self.out.push(
            Diagnostic::new(format!("the template in this string is broken: {why}"), origin.first_line(self.file), "")
                .with_help(help),
        );
    }
}

fn template_value(value: &Value) -> minijinja::Value {
    match value {
        Value::Bool(b) => (*b).into(),
        Value::Number(n) => match (n.as_i64(), n.as_f64()) {
            (Some(n), _) => n.into(),
            (None, Some(x)) => x.into(),
            (None, None) => n.to_string().into(),
        },
        Value::String(s) => s.as_str().into(),
        other => other.to_string().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::parse::parse_document;

    fn run(text: &str, given: &[(&str, &str)]) -> (Item, Params, Vec<String>) {
        let mut out = Vec::new();
        let mut root = parse_document(text, &mut out).unwrap();
        let given: Vec<(String, String)> = given.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let params = read_params(&root, &given, &mut out);
        fill(&mut root, &params, text, &mut out);
        (root, params, out.into_iter().map(|d| d.message).collect())
    }

    #[test]
    fn arguments_take_the_type_of_the_default() {
        let text = "[params]\nds = '2026-11-22'\nk = 10\nrate = 0.5\nfull = false\n";
        let (_, params, out) = run(text, &[("ds", "7"), ("k", "20"), ("rate", "1"), ("full", "true")]);
        assert!(out.is_empty(), "{out:?}");
        let json = serde_json::to_value(&params.values).unwrap();
        assert_eq!(json, serde_json::json!({"ds": "7", "k": 20, "rate": 1.0, "full": true}));
        let (_, _, out) = run(text, &[("k", "ten"), ("full", "yes"), ("dss", "x")]);
        assert_eq!(
            out,
            [
                "parameter `k` wants an integer",
                "parameter `full` wants a boolean",
                "the pipeline has no parameter `dss`"
            ]
        );
    }

    #[test]
    fn strings_are_templates() {
        let text = "a = ['{{ ds }}/x', 3]\nb = \"\"\"\nwhere ds <= '{{ ds }}'\n\"\"\"\nc = '{{ k + 1 }}'\n\
                    [params]\nds = '2026-11-22'\nk = 10\nraw = '{{ k }}'\n";
        let (root, params, out) = run(text, &[]);
        assert!(out.is_empty(), "{out:?}");
        assert_eq!(root.at("a.0").unwrap().as_str(), Some("2026-11-22/x"));
        assert_eq!(root.at("b").unwrap().as_str(), Some("where ds <= '2026-11-22'\n"), "the newline stays");
        assert_eq!(root.at("c").unwrap().as_str(), Some("11"));
        assert_eq!(params.values["raw"], "{{ k }}", "parameters are not templates");
    }

    #[test]
    fn mistakes_of_templates() {
        let (_, _, out) =
            run("a = '{{ dss }} {{ other }}'\nb = '{{ ds '\nc = '{{ ds | nope }}'\n[params]\nds = 1\n", &[]);
        assert_eq!(out[0], "there is no parameter `dss`");
        assert_eq!(out[1], "there is no parameter `other`");
        assert!(out[2].starts_with("the template in this string is broken"), "{out:?}");
        assert!(out[3].starts_with("the template in this string is broken"), "{out:?}");
        assert_eq!(out.len(), 4);
    }

    #[test]
    fn a_required_parameter_is_reported_once() {
        let text = "a = '{{ ds }}'\nb = '{{ ds }}'\n[params]\nds = { required = true }\n";
        assert_eq!(run(text, &[]).2, ["parameter `ds` is missing"]);
        assert!(run(text, &[("ds", "2026-11-22")]).2.is_empty());
    }

    #[test]
    fn declarations_are_plain() {
        let (_, _, out) = run("[params]\na = [1]\nb = { required = false }\nc = { x = 1 }\n'd e' = 1\n", &[]);
        assert_eq!(
            out,
            [
                "parameter `a` is a list",
                "parameter `b` is neither required nor has a default",
                "parameter `c` is a table",
                "`d e` cannot be a parameter's name"
            ]
        );
    }
}
