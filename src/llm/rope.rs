//! Rotary frequencies and the ways in which models stretch them to longer contexts.
//!
//! In: `rope_parameters` (transformers 5) or `rope_scaling` of a `config.json`, or the `<arch>.rope.*` keys and the
//! `rope_freqs.weight` tensor of a GGUF file. Out: [`RopeScaling`], and from it the frequencies.
//! Reference: transformers, `modeling_rope_utils.py`; llama.cpp writes the factors of `llama3` into a tensor.

use serde_json::Value as Json;

use super::gguf::{Gguf, Value};
use crate::error::Result;

/// How the rotary frequencies of a model differ from theta^(-2i / head_dim).
#[derive(Clone, Debug, Default, PartialEq)]
pub enum RopeScaling {
    /// They do not.
    #[default]
    None,
    /// All are divided by a factor, at least 1 as a rule (arXiv 2306.15595).
    Linear(f64),
    /// Llama 3: low frequencies are divided, high ones stay, those between are mixed.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above original context / this are low frequencies.
        low: f64,
        /// Wavelengths below original context / this are high frequencies.
        high: f64,
        /// Tokens of the context before it was stretched.
        original_context: f64,
    },
    /// A divisor per frequency, `[head_dim / 2]`: what GGUF files have for Llama 3.
    Factors(Vec<f32>),
}

/// What is supported, for messages.
const SUPPORTED: &str = "`default`, `linear` and `llama3` are supported";

impl RopeScaling {
    /// Frequencies of a head, `[head_dim / 2]`, in f32 steps as the reference computes them.
    pub fn frequencies(&self, theta: f64, head_dim: usize) -> Vec<f32> {
        let dim = head_dim as f32;
        let plain = (0..head_dim / 2).map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / dim));
        match self {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear(factor) => plain.map(|f| f / *factor as f32).collect(),
            RopeScaling::Factors(factors) => plain.zip(factors).map(|(f, by)| f / by).collect(),
            RopeScaling::Llama3 { factor, low, high, original_context } => {
                let (factor, low, high) = (*factor as f32, *low as f32, *high as f32);
                let context = *original_context as f32;
                let scale = |f: f32| {
                    let wavelength = 2.0 * std::f32::consts::PI / f;
                    if wavelength > context / low {
                        f / factor
                    } else if wavelength < context / high {
                        f
                    } else {
                        let smooth = (context / wavelength - low) / (high - low);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                };
                plain.map(scale).collect()
            }
        }
    }

    /// Checks that every frequency is a number above 0, and that there is a factor for each.
    pub fn check(&self, theta: f64, head_dim: usize) -> Result<(), String> {
        if let RopeScaling::Factors(factors) = self
            && factors.len() != head_dim / 2
        {
            return Err(format!(
                "`rope_freqs.weight` has {} factors, but a head has {} frequencies",
                factors.len(),
                head_dim / 2
            ));
        }
        match self.frequencies(theta, head_dim).iter().find(|f| !(f.is_finite() && **f > 0.0)) {
            Some(f) => Err(format!("the scaling of the rotary embeddings {self:?} makes the frequency {f}")),
            None => Ok(()),
        }
    }

    /// Reads `rope_parameters` or `rope_scaling` (`key`, for messages) of a `config.json`.
    /// `original_context` is the top-level key of that name, or else the context length.
    ///
    /// # Errors
    /// In words, where the kind is not supported or a number is missing.
    pub fn from_hf(key: &str, entry: &Json, original_context: Option<usize>) -> Result<Self, String> {
        if entry.is_null() {
            return Ok(RopeScaling::None);
        }
        if !entry.is_object() {
            return Err(format!("`{key}` is {entry}, not a table of parameters"));
        }
        for name in ["mrope_section", "mrope_interleaved"] {
            if !entry[name].is_null() {
                return Err(format!(
                    "`{key}` has `{name}`, which is not supported (a text has one position per token)"
                ));
            }
        }
        if let Some(part) = entry["partial_rotary_factor"].as_f64().filter(|part| *part != 1.0) {
            return Err(format!("`{key}` has the partial_rotary_factor {part}, which is not supported (1 is)"));
        }
        let kind = entry.get("rope_type").or_else(|| entry.get("type"));
        let kind = match kind {
            None | Some(Json::Null) => "default",
            Some(Json::String(kind)) => kind,
            Some(other) => return Err(format!("`{key}` has the type {other}, which is not supported ({SUPPORTED})")),
        };
        let number = |name: &str| {
            let value = entry[name].as_f64().filter(|x| x.is_finite() && *x > 0.0);
            value.ok_or_else(|| {
                format!("`{key}` of type `{kind}` needs a number above 0 as `{name}`, but it is {}", entry[name])
            })
        };
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear(number("factor")?)),
            "llama3" => {
                let name = "original_max_position_embeddings";
                let original = if entry[name].is_null() { original_context.map(|n| n as f64) } else { None };
                let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
                if high <= low {
                    return Err(format!("`{key}` has high_freq_factor {high}, not above low_freq_factor {low}"));
                }
                Ok(RopeScaling::Llama3 {
                    factor: number("factor")?,
                    low,
                    high,
                    original_context: original.map_or_else(|| number(name), Ok)?,
                })
            }
            other => Err(format!("`{key}` of type `{other}` is not supported ({SUPPORTED})")),
        }
    }

    /// Reads the keys and the tensor of a GGUF file whose architecture is `arch`.
    ///
    /// # Errors
    /// Exit 65 where the kind is not supported or a number is missing.
    pub fn from_gguf(gguf: &Gguf, arch: &str) -> Result<Self> {
        let type_key = format!("{arch}.rope.scaling.type");
        let kind = match gguf.get(&type_key) {
            None => "none",
            Some(Value::Text(kind)) => kind.as_str(),
            Some(other) => return Err(gguf.fault(format!("`{type_key}` is {other:?}, not text"))),
        };
        let factors = match gguf.tensor("rope_freqs.weight") {
            Some(_) => Some(gguf.dequantize("rope_freqs.weight")?),
            None => None,
        };
        // Files from before `scaling.type` have the factor alone.
        let linear = match gguf.number_opt(&format!("{arch}.rope.scaling.factor"))? {
            Some(factor) => Some(factor),
            None => gguf.number_opt(&format!("{arch}.rope.scale_linear"))?,
        };
        match (kind, linear, factors) {
            ("linear", None, _) => Err(gguf.fault(format!("`{arch}.rope.scaling.factor` is missing"))),
            ("linear", Some(_), Some(_)) => {
                Err(gguf.fault(format!("`rope_freqs.weight` and `{type_key}` = linear are not supported together")))
            }
            ("linear", Some(factor), None) => Ok(RopeScaling::Linear(factor)),
            ("none" | "llama3", _, Some(factors)) => Ok(RopeScaling::Factors(factors)),
            ("none", Some(factor), None) if factor != 1.0 && gguf.get(&type_key).is_none() => {
                Ok(RopeScaling::Linear(factor))
            }
            ("none", _, None) => Ok(RopeScaling::None),
            (other, _, _) => Err(gguf.fault(format!(
                "scaled rotary embeddings of the type `{other}` are not supported (`none`, `linear` and the factors of Llama 3 are)"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn llama3_mixes_between_its_two_wavelengths() {
        let entry = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                           "original_max_position_embeddings": 8192, "rope_theta": 5e5});
        let scaling = RopeScaling::from_hf("rope_scaling", &entry, None).unwrap();
        let (plain, scaled) = (RopeScaling::None.frequencies(5e5, 128), scaling.frequencies(5e5, 128));
        assert_eq!(plain[..20], scaled[..20]);
        assert_eq!(plain[63] / 8.0, scaled[63]);
        let mixed = (0..64).filter(|&i| scaled[i] != plain[i] && scaled[i] != plain[i] / 8.0).count();
        assert!((1..20).contains(&mixed), "{mixed}");
        scaling.check(5e5, 128).unwrap();
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (entry, word) in [
            (json!({"type": "yarn", "factor": 4.0}), "`yarn`"),
            (json!({"rope_type": "dynamic", "factor": 4.0}), "`dynamic`"),
            (json!({"rope_type": "linear"}), "`factor`"),
            (json!({"rope_type": "linear", "factor": 0.0}), "`factor`"),
            (json!({"rope_type": "llama3", "factor": 8.0}), "`low_freq_factor`"),
            (json!({"type": "default", "mrope_section": [16, 24, 24]}), "mrope_section"),
            (json!({"rope_type": 3}), "3"),
            (json!("linear"), "not a table"),
        ] {
            let error = RopeScaling::from_hf("rope_scaling", &entry, Some(64)).unwrap_err();
            assert!(error.contains(word) && error.contains("rope_scaling"), "{error}");
        }
        assert_eq!(RopeScaling::from_hf("k", &Json::Null, None), Ok(RopeScaling::None));
        assert!(RopeScaling::Factors(vec![1.0, 0.0]).check(1e4, 4).unwrap_err().contains("frequency"));
        assert!(RopeScaling::Factors(vec![1.0]).check(1e4, 4).unwrap_err().contains("1 factors"));
    }
}
