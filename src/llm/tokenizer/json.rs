//! Whether bytes are JSON to the last escape, without keeping any of it.
//!
//! The tokenizers library unwraps what its nested parsers say of broken JSON, so what is broken is found before.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::Value as Json;

/// Any JSON value, read in full (numbers in range, text with its escapes) and dropped.
struct Checked;

impl<'de> Deserialize<'de> for Checked {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Checked)
    }
}

impl<'de> Visitor<'de> for Checked {
    type Value = Checked;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Checked, E> {
        Ok(Checked)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Checked, E> {
        Ok(Checked)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Checked, E> {
        Ok(Checked)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Checked, E> {
        Ok(Checked)
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<Checked, E> {
        Ok(Checked)
    }

    fn visit_unit<E: Error>(self) -> Result<Checked, E> {
        Ok(Checked)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Checked, A::Error> {
        while list.next_element::<Checked>()?.is_some() {}
        Ok(Checked)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut table: A) -> Result<Checked, A::Error> {
        while table.next_entry::<Checked, Checked>()?.is_some() {}
        Ok(Checked)
    }
}

/// The part of a `tokenizer.json` that is looked into here.
#[derive(Deserialize)]
struct Parts {
    normalizer: Option<Json>,
}

/// Reads bytes as the JSON of a tokenizer.
///
/// # Errors
/// What is wrong, and where; a normaliser with a compiled table too (`Precompiled`, of Unigram models): the
/// library takes room for as many entries as its first four bytes say.
pub fn check(bytes: &[u8]) -> Result<(), String> {
    let said = |e: serde_json::Error| e.to_string();
    serde_json::from_slice::<Checked>(bytes).map_err(said)?;
    let parts: Parts = serde_json::from_slice(bytes).map_err(said)?;
    match parts.normalizer.is_some_and(|n| compiled(&n)) {
        true => Err("the normalizer `Precompiled` is not supported".to_owned()),
        false => Ok(()),
    }
}

/// Whether a normaliser is, or has inside, a compiled table.
fn compiled(part: &Json) -> bool {
    match part {
        Json::Object(table) => table.contains_key("precompiled_charsmap") || table.values().any(compiled),
        Json::Array(list) => list.iter().any(compiled),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_library_stumbles_over_is_found() {
        check(br#"{"a": [1, -2.5, "\u00e9", null, true, {}], "normalizer": {"type": "NFC"}}"#).unwrap();
        let table =
            br#"{"normalizer": {"normalizers": [{"type": "Precompiled", "precompiled_charsmap": "////fw=="}]}}"#;
        assert!(check(table).unwrap_err().contains("Precompiled"));
        for broken in [&b"{"[..], br#""\ud800""#, b"\"\x91\"", b"1e999", b"[1 2]", b"", &b"[".repeat(9999)] {
            check(broken).unwrap_err();
        }
    }
}
