//! Fingerprints: what a node's result depends on, as one sha256.
//!
//! In: stage kind and version, resolved config, digests of inputs and model weights, seed.
//! Out: 32 hex digits that name the node's folder below `artifacts/`. The name of a stage, the
//! device, the number of threads and the place of the files are not part of it.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// What a node's result depends on.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Stage kind, or `source`.
    pub kind: String,
    /// Version of the kind's code.
    pub version: u32,
    /// Resolved config.
    pub config: Value,
    /// Slot -> sha256 of the content of what it names.
    pub inputs: BTreeMap<String, String>,
    /// Model name -> sha256 of its weights.
    pub models: BTreeMap<String, String>,
    /// Seed of the stage.
    pub seed: u64,
}

impl Identity {
    /// The document that is hashed; kept in `stage.json`, so that two fingerprints can be compared by eye.
    pub fn document(&self) -> Value {
        json!({
            "kind": self.kind,
            "version": self.version,
            "config": canonical(&self.config),
            "inputs": self.inputs,
            "models": self.models,
            "seed": self.seed,
        })
    }

    /// 32 hex digits (128 bits of sha256) of the canonical document.
    pub fn fingerprint(&self) -> String {
        let mut hex = sha256_hex(canonical(&self.document()).to_string().as_bytes());
        hex.truncate(32);
        hex
    }
}

/// The same JSON with every object's keys sorted, so that equal values have equal text.
pub fn canonical(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<&String, Value> = map.iter().map(|(k, v)| (k, canonical(v))).collect();
            Value::Object(sorted.into_iter().map(|(k, v)| (k.clone(), v)).collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(canonical).collect()),
        other => other.clone(),
    }
}

/// sha256 as 64 hex digits.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Bytes as lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            kind: "fuse".into(),
            version: 1,
            config: json!({"a1": 0.5, "k": 10}),
            inputs: BTreeMap::from([("shortlist".to_owned(), "aa".to_owned())]),
            models: BTreeMap::new(),
            seed: 42,
        }
    }

    #[test]
    fn key_order_does_not_matter_and_everything_else_does() {
        let base = identity().fingerprint();
        let mut reordered = identity();
        reordered.config = json!({"k": 10, "a1": 0.5});
        assert_eq!(base, reordered.fingerprint());

        let mut others = vec![identity(); 5];
        others[0].kind = "write".into();
        others[1].version = 2;
        others[2].config = json!({"a1": 0.5, "k": 11});
        others[3].inputs.insert("shortlist".into(), "ab".into());
        others[4].seed = 43;
        for other in others {
            assert_ne!(base, other.fingerprint(), "{other:?}");
        }
        assert_eq!(base.len(), 32);
    }
}
