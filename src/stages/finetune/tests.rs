//! Configs, and tables as examples.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, StringArray};
use serde_json::{Value, json};

use super::examples::{Examples, Tables};
use super::*;

fn config(extra: Value) -> Result<FinetuneConfig> {
    let mut config = json!({ "model": "m", "examples": "e" });
    config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    let config: FinetuneConfig = serde_json::from_value(config).unwrap();
    config.check()?;
    config.lora()?;
    Ok(config)
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    for (extra, word) in [
        (json!({ "rank": 0 }), "`rank`"),
        (json!({ "batch": 0 }), "`batch`"),
        (json!({ "dropout": 1.0 }), "`dropout`"),
        (json!({ "clip": -1.0 }), "`clip`"),
        (json!({ "targets": ["q_proj", "lm_head"] }), "`lm_head`"),
        (json!({ "targets": [] }), "`targets`"),
        (json!({ "steps": 3, "tokens": 3 }), "`steps` and `tokens`"),
        (json!({ "examples": null }), "needs `examples`"),
        (json!({ "objective": "titles" }), "needs `histories`"),
        (json!({ "histories": "h" }), "`histories`"),
    ] {
        let error = config(extra.clone()).unwrap_err();
        assert_eq!(error.fault.exit_code(), 78, "{extra}");
        assert!(error.message.contains(word), "{extra}: {}", error.message);
    }
    let rate = |extra| config(extra).unwrap().rate();
    assert_eq!(
        [rate(json!({})), rate(json!({ "method": "full" })), rate(json!({ "learning_rate": 1e-3 }))],
        [2e-4, 2e-5, 1e-3]
    );
}

#[test]
fn an_adapter_has_two_outputs_and_all_weights_have_one() {
    let outputs = |extra| {
        let stage = Finetune { config: config(extra).unwrap(), every: Duration::ZERO };
        stage.outputs().iter().map(|o| o.name).collect::<Vec<_>>()
    };
    assert_eq!(outputs(json!({})), ["model", "adapter", "curve"]);
    assert_eq!(outputs(json!({ "merge": false })), ["adapter", "curve"]);
    assert_eq!(outputs(json!({ "method": "full" })), ["model", "curve"]);
}

/// A folder with a small tokenizer (`<|end|>` is its token 361) and a chat template.
fn tokenizer(folder: &Path) -> ChatTokenizer {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/llm/tokenizers/smollm.json");
    std::fs::copy(golden, folder.join("tokenizer.json")).unwrap();
    let shape = json!({
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "vocab_size": 4096, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "eos_token_id": 361,
    });
    std::fs::write(folder.join("config.json"), shape.to_string()).unwrap();
    let template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    std::fs::write(folder.join("tokenizer_config.json"), json!({ "chat_template": template }).to_string()).unwrap();
    ChatTokenizer::open(folder).unwrap()
}

fn table(columns: Vec<(&str, Vec<Option<&str>>)>) -> Table {
    let columns =
        columns.into_iter().map(|(name, values)| (name, Arc::new(StringArray::from(values)) as ArrayRef, true));
    Table::from_columns(columns.collect()).unwrap()
}

fn instructions(splits: Vec<Option<&str>>) -> Table {
    let n = splits.len();
    table(vec![
        ("system", vec![Some("You rank."); n]),
        ("prompt", vec![Some("Which film?"); n]),
        ("response", vec![Some("Heat"); n]),
        ("split", splits),
    ])
}

#[test]
fn rows_become_examples_of_their_split_whose_response_is_learned() {
    let folder = tempfile::tempdir().unwrap();
    let chat = tokenizer(folder.path());
    let read = |tables: &Tables, extra| Examples::read(tables, &config(extra).unwrap(), &chat, 1, &Cancel::default());
    let tables = |splits| Tables { examples: Some(instructions(splits)), histories: None };
    let all = read(&tables(vec![Some("train"), Some("held-out"), Some("train")]), json!({})).unwrap();
    assert_eq!((all.train.len(), all.held_out.len(), all.too_long), (2, 1, 0));
    let example = &all.train[0];
    let learned: Vec<u32> = example.ids.iter().zip(&example.learned).filter(|(_, l)| **l).map(|(id, _)| *id).collect();
    assert_eq!(learned, [chat.encode_text("Heat"), vec![361]].concat());
    assert_eq!(
        chat.decode(&example.ids[..example.ids.len() - learned.len()]),
        "[system]You rank.\n[user]Which film?\n[assistant]"
    );
    assert_eq!(read(&tables(vec![Some("train")]), json!({ "max_tokens": 5 })).unwrap().too_long, 1);
    for wrong in [Some("test"), None] {
        assert_eq!(read(&tables(vec![wrong]), json!({})).unwrap_err().fault.exit_code(), 65);
    }
    let other = read(&tables(vec![Some("train")]), json!({})).unwrap();
    assert_ne!(all.digest(), other.digest());
}

#[test]
fn of_a_list_every_title_but_the_first_is_learned() {
    let folder = tempfile::tempdir().unwrap();
    let chat = tokenizer(folder.path());
    let users = Arc::new(Int64Array::from(vec![4, 4, 9, 4, 4])) as ArrayRef;
    let titles =
        Arc::new(StringArray::from(vec![Some("Heat"), Some("Fargo\n<|end|>"), Some("Alone"), None, Some("Big")]));
    let columns = vec![("user_id", users, false), ("title", titles as ArrayRef, true)];
    let tables = Tables {
        examples: Some(instructions(vec![Some("train"), Some("held-out")])),
        histories: Some(Table::from_columns(columns).unwrap()),
    };
    let extra = json!({ "objective": "titles", "histories": "h", "titles_prompt": "List." });
    let all = Examples::read(&tables, &config(extra).unwrap(), &chat, 1, &Cancel::default()).unwrap();
    // Of the instructions only those held out; of one title nothing can be learned.
    assert_eq!((all.train.len(), all.held_out.len()), (1, 1));
    let example = &all.train[0];
    let learned: Vec<u32> = example.ids.iter().zip(&example.learned).filter(|(_, l)| **l).map(|(id, _)| *id).collect();
    assert_eq!(chat.decode(&learned[..learned.len() - 1]), "Fargo <|end|>\nBig\n");
    // The title's characters are no special token: the only one is the end of the answer.
    assert_eq!(learned.iter().filter(|id| **id == 361).count(), 1);
}

#[test]
fn long_lists_are_cut_and_users_held_out_by_a_hash() {
    let folder = tempfile::tempdir().unwrap();
    let chat = tokenizer(folder.path());
    let n = 200;
    let users = Arc::new(Int64Array::from_iter_values((0..n * 6).map(|i| i / 6))) as ArrayRef;
    let titles = Arc::new(StringArray::from_iter_values((0..n * 6).map(|i| format!("Film {i}")))) as ArrayRef;
    let histories = Table::from_columns(vec![("user_id", users, false), ("title", titles, true)]).unwrap();
    let tables = Tables { examples: None, histories: Some(histories) };
    let read = |max_tokens: usize, seed: u64| {
        let extra = json!({ "examples": null, "objective": "titles", "histories": "h", "titles_prompt": "L", "max_tokens": max_tokens });
        Examples::read(&tables, &config(extra).unwrap(), &chat, seed, &Cancel::default()).unwrap()
    };
    let whole = read(500, 1);
    assert_eq!(whole.train.len() + whole.held_out.len(), n as usize);
    assert!((2..=25).contains(&whole.held_out.len()), "{}", whole.held_out.len());
    assert_ne!(whole.held_out, read(500, 2).held_out);
    let longest = whole.train[0].ids.len();
    let cut = read(longest - 8, 1);
    assert!(cut.train.len() > whole.train.len());
    assert!(cut.train.iter().chain(&cut.held_out).all(|e| e.ids.len() <= longest - 8));
}
