//! Settings that other settings switch off: whoever changes one of them believes that it does something, so it is an
//! error.
//!
//! In: a backbone's rules, its hyper-parameters in full and those that were given. Out: nothing, or an error (exit 78)
//! that names the setting, what switches it off and the way out. Saved models are not checked: they have every
//! setting, also the idle ones.

use serde_json::Value;

use crate::error::{Error, Result};

/// Hyper-parameters that have no effect in some case.
#[derive(Clone, Copy, Debug)]
pub struct Idle {
    /// Their names.
    pub keys: &'static [&'static str],
    /// Whether that is the case, given the hyper-parameters in full.
    pub when: fn(full: &Value) -> bool,
    /// What switches them off, after "has no effect": `with "use_attention = false"`.
    pub why: &'static str,
}

/// Finds a setting that was given, is idle, and is not as it would be had it been left out. `full_of` gives the
/// hyper-parameters in full for given ones.
///
/// # Errors
/// There is one (exit 78); what `full_of` returns.
pub fn check(model: &str, rules: &[Idle], given: &Value, full_of: &dyn Fn(&Value) -> Result<Value>) -> Result<()> {
    let full = full_of(given)?;
    for rule in rules.iter().filter(|rule| (rule.when)(&full)) {
        for key in rule.keys.iter().filter(|key| given.get(**key).is_some()) {
            let mut without = given.clone();
            without.as_object_mut().expect("hyper-parameters that were read are a table").remove(*key);
            if full_of(&without)?.get(*key) != full.get(*key) {
                return Err(Error::spec(format!("hyper-parameter `{key}` of `{model}` has no effect {}", rule.why))
                    .with_help(format!("leave `{key}` out, or change what switches it off")));
            }
        }
    }
    Ok(())
}

/// Whether a number is 0.
pub fn is_zero(full: &Value, key: &str) -> bool {
    full.get(key).and_then(Value::as_f64) == Some(0.0)
}

/// Whether a text is another one than `value`.
pub fn is_not(full: &Value, key: &str, value: &str) -> bool {
    full.get(key).and_then(Value::as_str).is_some_and(|text| text != value)
}

/// How many entries a list has.
pub fn len(full: &Value, key: &str) -> usize {
    full.get(key).and_then(Value::as_array).map_or(0, Vec::len)
}

#[cfg(test)]
mod tests {
    use super::super::registry::{self, BACKBONES};
    use serde_json::{Value, json};

    fn error_of(model: &str, given: Value) -> crate::error::Error {
        registry::find(model).unwrap().hyper(&given).expect_err("an idle setting must be found")
    }

    /// A case that switches each rule on, with an idle setting.
    fn cases() -> Vec<(&'static str, Value, &'static str)> {
        vec![
            ("ease", json!({"floor": 0.5}), "floor"),
            ("gf_cf", json!({"alpha": 0, "rank": 3}), "rank"),
            ("sgl", json!({"contrast_weight": 0, "drop_rate": 0.2}), "drop_rate"),
            ("sgl", json!({"contrast_weight": 0, "contrast_temperature": 0.5}), "contrast_temperature"),
            ("sgl", json!({"contrast_weight": 0, "augmentation": "node-drop"}), "augmentation"),
            ("sgl", json!({"drop_rate": 0, "augmentation": "node-drop"}), "augmentation"),
            ("sasrec", json!({"negatives": 9}), "negatives"),
            ("sasrec", json!({"loss": "bce", "exclude_seen": false}), "exclude_seen"),
            ("bert4rec", json!({"negative_power": 0.1}), "negative_power"),
            ("bert4rec", json!({"last_mask_rate": 1, "mask_rate": 0.9}), "mask_rate"),
            ("cl4srec", json!({"augmentations": ["crop"], "mask_rate": 0.9}), "mask_rate"),
            ("cl4srec", json!({"augmentations": ["mask"], "crop_rate": 0.9}), "crop_rate"),
            ("cl4srec", json!({"augmentations": ["crop"], "reorder_rate": 0.9}), "reorder_rate"),
            ("cl4srec", json!({"cl_rate": 0, "temperature": 0.5}), "temperature"),
            ("cl4srec", json!({"cl_rate": 0, "augmentations": ["crop"]}), "augmentations"),
            ("deepfm", json!({"dnn_hidden_units": [], "dnn_dropout": 0.5}), "dnn_dropout"),
            ("nfm", json!({"dnn_hidden_units": [], "dnn_use_bn": true}), "dnn_use_bn"),
            ("dcn", json!({"cross_num": 0, "cross_parameterization": "matrix"}), "cross_parameterization"),
            ("afm", json!({"use_attention": false, "attention_factor": 5}), "attention_factor"),
            ("afm", json!({"use_attention": false, "afm_dropout": 0.5}), "afm_dropout"),
            ("xdeepfm", json!({"cin_layer_size": [], "l2_reg_cin": 0.5}), "l2_reg_cin"),
            ("xdeepfm", json!({"cin_layer_size": [8], "cin_split_half": false}), "cin_split_half"),
            ("autoint", json!({"att_layer_num": 0, "att_head_num": 4}), "att_head_num"),
        ]
    }

    #[test]
    fn a_setting_that_another_one_switches_off_is_an_error() {
        for (model, given, key) in cases() {
            let error = error_of(model, given.clone());
            assert_eq!(error.fault.exit_code(), 78, "{model} {given}");
            assert!(error.message.contains(&format!("`{key}` of `{model}` has no effect")), "{error}");
            assert!(error.help.unwrap().contains(key));
        }
    }

    #[test]
    fn every_rule_has_a_case() {
        for backbone in BACKBONES {
            for rule in backbone.idle {
                let told = cases().iter().any(|(model, _, key)| *model == backbone.name && rule.keys.contains(key))
                    || {
                        // Rules that several models share are tested with one of them.
                        let shares = |b: &&registry::Backbone| b.idle.iter().any(|r| std::ptr::eq(r.keys, rule.keys));
                        let models: Vec<&str> = BACKBONES.iter().filter(shares).map(|b| b.name).collect();
                        cases().iter().any(|(model, _, key)| models.contains(model) && rule.keys.contains(key))
                    };
                assert!(told, "no case for {:?} of {}", rule.keys, backbone.name);
            }
        }
    }

    #[test]
    fn a_rule_names_settings_that_there_are() {
        for backbone in BACKBONES {
            let full = backbone.hyper(&json!({})).unwrap();
            for key in backbone.idle.iter().flat_map(|rule| rule.keys) {
                assert!(full.get(key).is_some(), "{}: {key}", backbone.name);
            }
        }
    }

    #[test]
    fn an_idle_setting_at_its_default_is_no_mistake() {
        registry::find("afm").unwrap().hyper(&json!({"use_attention": false, "attention_factor": 8})).unwrap();
        registry::find("sgl").unwrap().hyper(&json!({"contrast_weight": 0})).unwrap();
    }
}
