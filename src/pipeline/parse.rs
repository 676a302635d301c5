//! TOML text and `--set` arguments -> a tree with places.
//!
//! First pass of two: nothing here knows which keys exist. In: the file's text, and the
//! arguments. Out: one [`Item`], or the mistakes that the TOML itself has.

use std::ops::Range;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::diagnostics::Diagnostic;
use super::document::{Entry, Item, ItemValue, Origin};

/// Deepest path that `--set` may name.
const DEEPEST_SET: usize = 16;

/// The file as a tree; its mistakes where it is no TOML.
pub fn parse_document(text: &str, out: &mut Vec<Diagnostic>) -> Option<Item> {
    let (table, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        // After a broken line the parser guesses, and its later complaints mislead. Duplicate
        // keys break nothing, so that all of them are shown.
        let all_duplicate = errors.iter().all(|e| e.message() == "duplicate key");
        let shown = if all_duplicate { errors.len() } else { 1 };
        out.extend(errors.iter().take(shown).map(|e| toml_mistake(text, e)));
        return None;
    }
    let mut place = Origin::File;
    let entries = entries(table.get_ref(), &mut place, out);
    Some(Item::new(ItemValue::Table(entries), Origin::File(0..0)))
}

fn toml_mistake(text: &str, error: &toml::de::Error) -> Diagnostic {
    let span = error.span().unwrap_or(0..0);
    if error.message() == "duplicate key" {
        let key = text.get(span.clone()).unwrap_or_default();
        return Diagnostic::new(format!("the key `{key}` is given twice"), Origin::File(span), "the second one")
            .with_help("keep one of them; a table `[x]` may be opened once only");
    }
    Diagnostic::new(format!("this is not TOML: {}", error.message()), Origin::File(span), "")
        .with_help("strings need quotes, tables a header such as `[stages.train_set]`; see https://toml.io")
}

fn entries(
    table: &DeTable<'_>,
    place: &mut dyn FnMut(Range<usize>) -> Origin,
    out: &mut Vec<Diagnostic>,
) -> Vec<Entry> {
    let mut entries: Vec<Entry> = table
        .iter()
        .map(|(key, value)| Entry {
            key: key.get_ref().to_string(),
            key_origin: place(key.span()),
            item: item(value, place, out),
        })
        .collect();
    // The parser moves a table that is opened after its children to the end; we keep file order.
    entries.sort_by_key(|e| e.key_origin.order());
    entries
}

fn item(
    value: &Spanned<DeValue<'_>>,
    place: &mut dyn FnMut(Range<usize>) -> Origin,
    out: &mut Vec<Diagnostic>,
) -> Item {
    let origin = place(value.span());
    let mut invalid = |why: &str| {
        out.push(Diagnostic::new(why.to_owned(), origin.clone(), ""));
        ItemValue::Invalid
    };
    let value = match value.get_ref() {
        DeValue::String(s) => ItemValue::String(s.to_string()),
        DeValue::Integer(n) => match i64::from_str_radix(n.as_str(), n.radix()) {
            Ok(n) => ItemValue::Integer(n),
            Err(_) => invalid("this integer does not fit 64 bits"),
        },
        DeValue::Float(x) => match x.as_str().parse::<f64>() {
            Ok(x) if x.is_finite() => ItemValue::Float(x),
            _ => invalid("this is not a finite number"),
        },
        DeValue::Boolean(b) => ItemValue::Boolean(*b),
        DeValue::Datetime(d) => ItemValue::Datetime(d.to_string()),
        DeValue::Array(items) => ItemValue::Array(items.iter().map(|i| item(i, place, out)).collect()),
        DeValue::Table(table) => ItemValue::Table(entries(table, place, out)),
    };
    Item::new(value, origin)
}

/// Lays the `--set KEY=VALUE` arguments over the file. `KEY` is `stage.key` or `source.key`
/// (deeper with more dots), or a top-level key. `VALUE` is read as TOML, else as a string.
pub fn apply_sets(root: &mut Item, sets: &[(String, String)], out: &mut Vec<Diagnostic>) {
    for (path, value) in sets {
        if let Err(mistake) = apply_set(root, path, value, out) {
            out.push(mistake);
        }
    }
}

fn apply_set(root: &mut Item, path: &str, value: &str, out: &mut Vec<Diagnostic>) -> Result<(), Diagnostic> {
    let text: Arc<str> = format!("--set {path}={value}").into();
    let start = "--set ".len();
    let at = |span: Range<usize>| Origin::Argument { text: text.clone(), span };
    // The parts of the path with their places.
    let mut parts: Vec<(&str, Origin)> = Vec::new();
    let mut offset = start;
    for part in path.split('.') {
        parts.push((part, at(offset..offset + part.len())));
        offset += part.len() + 1;
    }
    if parts.iter().any(|(p, _)| p.is_empty()) || parts.len() > DEEPEST_SET {
        return Err(Diagnostic::new(format!("`{path}` is not a path of keys"), at(start..start + path.len()), "")
            .with_help("write `--set stage.key=value`, for example `--set lightgcn.hyper.layers=2`"));
    }
    let mut target = root;
    let (first, first_origin) = parts[0].clone();
    if first == "params" {
        return Err(Diagnostic::new("a parameter is not set with `--set`", first_origin, "")
            .with_help(format!("write `--param {}={value}`", parts.get(1).map_or("name", |p| p.0))));
    }
    if parts.len() > 1 && first != "stages" && first != "sources" {
        let section = ["stages", "sources"].into_iter().find(|s| target.get(s).is_some_and(|t| t.get(first).is_some()));
        match section {
            Some(section) => target = enter(target, section, &first_origin)?,
            None => {
                let names: Vec<&str> = ["stages", "sources"]
                    .into_iter()
                    .filter_map(|s| target.get(s))
                    .flat_map(|t| t.entries().iter().map(|e| e.key.as_str()))
                    .collect();
                return Err(Diagnostic::new(format!("there is no stage or source `{first}`"), first_origin, "")
                    .with_suggestion(first, names, "there are"));
            }
        }
    }
    for (part, origin) in &parts[..parts.len() - 1] {
        target = enter(target, part, origin)?;
    }
    let (last, last_origin) = &parts[parts.len() - 1];
    let value_start = start + path.len() + 1;
    let origin = at(value_start..value_start + value.len());
    let mut new = match DeValue::parse(value) {
        Ok(parsed) => item(&parsed, &mut |s| at(value_start + s.start..value_start + s.end), out),
        Err(_) => Item::new(ItemValue::String(value.to_owned()), origin.clone()),
    };
    new.origin = origin;
    new.raw = Some(value.to_owned());
    let entry = Entry { key: (*last).to_owned(), key_origin: last_origin.clone(), item: new };
    let ItemValue::Table(entries) = &mut target.value else {
        return Err(not_a_table(path, last_origin, target));
    };
    match entries.iter_mut().find(|e| e.key == *last) {
        Some(old) => *old = entry,
        None => entries.push(entry),
    }
    Ok(())
}

/// The table `key` of `item`, made where it is not there.
fn enter<'a>(item: &'a mut Item, key: &str, origin: &Origin) -> Result<&'a mut Item, Diagnostic> {
    if !matches!(item.value, ItemValue::Table(_)) {
        return Err(not_a_table(key, origin, item));
    }
    let ItemValue::Table(entries) = &mut item.value else {
        return Err(Diagnostic::new("not a table", origin.clone(), ""));
    };
    let index = match entries.iter().position(|e| e.key == key) {
        Some(index) => index,
        None => {
            let table = Item::new(ItemValue::Table(Vec::new()), origin.clone());
            entries.push(Entry { key: key.to_owned(), key_origin: origin.clone(), item: table });
            entries.len() - 1
        }
    };
    Ok(&mut entries[index].item)
}

fn not_a_table(key: &str, origin: &Origin, item: &Item) -> Diagnostic {
    Diagnostic::new(
        format!("`{key}` cannot be set: what stands before it is {}, not a table", item.type_name()),
        origin.clone(),
        "",
    )
    .also(item.origin.clone(), "given here")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(text: &str) -> Item {
        let mut out = Vec::new();
        let item = parse_document(text, &mut out);
        assert!(out.is_empty(), "{out:?}");
        item.unwrap()
    }

    fn set(root: &mut Item, path: &str, value: &str) -> Vec<Diagnostic> {
        let mut out = Vec::new();
        apply_sets(root, &[(path.to_owned(), value.to_owned())], &mut out);
        out
    }

    const TEXT: &str =
        "name = 'x'\n[stages.a]\nkind = 'train'\n[stages.a.hyper]\nlayers = 3\n[sources.log]\nuri = 'u'\n";

    #[test]
    fn order_is_the_files() {
        let root = tree("[stages.b.c]\nx = 1\n[stages.a]\ny = 1\n[stages.b]\nz = 2\n");
        let keys: Vec<&str> = root.get("stages").unwrap().entries().iter().map(|e| e.key.as_str()).collect();
        assert_eq!(keys, ["a", "b"], "`b` is opened in the sixth line");
    }

    #[test]
    fn places_are_byte_ranges_of_the_file() {
        let root = tree(TEXT);
        let layers = root.at("stages.a.hyper.layers").unwrap();
        let Origin::File(span) = layers.origin.clone() else { panic!() };
        assert_eq!(&TEXT[span], "3");
        let Origin::File(span) = root.at("stages.a").unwrap().origin.clone() else { panic!() };
        assert_eq!(&TEXT[span], "[stages.a]");
    }

    #[test]
    fn set_reaches_stages_sources_and_the_top() {
        let mut root = tree(TEXT);
        assert!(set(&mut root, "a.hyper.layers", "2").is_empty());
        assert!(set(&mut root, "a.hyper.dropout.rate", "0.5").is_empty(), "tables are made");
        assert!(set(&mut root, "log.uri", "s3://b/p").is_empty(), "no TOML, so a string");
        assert!(set(&mut root, "seed", "7").is_empty());
        assert!(set(&mut root, "stages.a.list", "[1, 2]").is_empty());
        assert_eq!(root.at("stages.a.hyper.layers").unwrap().to_json(), 2);
        assert_eq!(root.at("stages.a.hyper.dropout.rate").unwrap().to_json(), 0.5);
        assert_eq!(root.at("sources.log.uri").unwrap().to_json(), "s3://b/p");
        assert_eq!(root.at("seed").unwrap().to_json(), 7);
        assert_eq!(root.at("stages.a.list.1").unwrap().to_json(), 2);
    }

    #[test]
    fn set_refuses_what_leads_nowhere() {
        let mut root = tree(TEXT);
        assert!(set(&mut root, "aa.x", "1")[0].message.contains("no stage or source `aa`"));
        assert!(set(&mut root, "a.kind.x", "1")[0].message.contains("not a table"));
        assert!(set(&mut root, "a..x", "1")[0].message.contains("not a path"));
        assert!(set(&mut root, "params.ds", "1")[0].help[0].contains("--param ds=1"));
        assert!(set(&mut root, &"a.".repeat(99_999), "1")[0].message.contains("not a path"));
    }

    #[test]
    fn numbers_must_fit() {
        let mut out = Vec::new();
        parse_document("a = 99999999999999999999\nb = nan\nc = 0x10\n", &mut out);
        let messages: Vec<&str> = out.iter().map(|d| d.message.as_str()).collect();
        assert_eq!(messages, ["this integer does not fit 64 bits", "this is not a finite number"]);
    }
}
