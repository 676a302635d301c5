//! `tailfuse llm`: the JSON-lines protocol.

use serde_json::{Value as Json, json};
use tailfuse::device::DeviceChoice;
use tailfuse::llm::{Llm, serve};

use crate::llm::{golden, golden_json, ids, model};

/// Sends lines and gives back one answer for each.
fn ask(llm: &Llm, lines: &[String]) -> Vec<Json> {
    let mut output = Vec::new();
    serve(llm, lines.join("\n").as_bytes(), &mut output).unwrap();
    let answers: Vec<Json> =
        String::from_utf8(output).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(answers.len(), lines.len());
    answers
}

#[test]
fn weights_without_a_tokenizer_serve_ids() {
    let llm = Llm::open(&golden("tiny"), DeviceChoice::Cpu).unwrap();
    let want = golden_json("tiny/golden.json");
    let sequence = &want["sequences"][0]["ids"];
    let answers = ask(
        &llm,
        &[
            json!({"op": "logits", "ids": sequence, "top": 3, "probe": [0, 63]}).to_string(),
            json!({"op": "score", "ids": sequence, "continuations": [[5, 6], [7]]}).to_string(),
            json!({"op": "generate", "ids": sequence, "max_new": 4}).to_string(),
            json!({"op": "tokenize", "text": "x"}).to_string(),
            json!({"op": "labels", "ids": sequence, "labels": [7, 9]}).to_string(),
            json!({"op": "labels", "ids": sequence, "labels": [7, 9], "among": true}).to_string(),
            json!({"op": "rank", "ids": sequence, "candidates": [[5, 62], [5, 6, 62], [7, 62]]}).to_string(),
            json!({"op": "rate", "ids": sequence, "ratings": [[1, [7]], [2, [9]]]}).to_string(),
            json!({"op": "hidden", "ids": sequence}).to_string(),
            json!({"op": "memory"}).to_string(),
        ],
    );
    let row: Vec<f64> = want["logits"][0]
        .as_array()
        .unwrap()
        .last()
        .unwrap()
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_f64().unwrap())
        .collect();
    let top = answers[0]["top"].as_array().unwrap();
    assert_eq!(top.len(), 3);
    let largest = row.iter().copied().fold(f64::MIN, f64::max);
    assert!((top[0][1].as_f64().unwrap() - largest).abs() < 1e-4);
    assert!((answers[0]["probe"][1][1].as_f64().unwrap() - row[63]).abs() < 1e-4);
    let mean = row.iter().sum::<f64>() / 64.0;
    assert!((answers[0]["mean"].as_f64().unwrap() - mean).abs() < 1e-4);
    let normalizer = row.iter().map(|l| l.exp()).sum::<f64>().ln();
    assert!((answers[0]["logsumexp"].as_f64().unwrap() - normalizer).abs() < 1e-4);
    assert!((answers[1]["logprobs"][1][0].as_f64().unwrap() - (row[7] - normalizer)).abs() < 1e-4);
    let parts = &answers[1]["logprobs"][0];
    let sum = parts[0].as_f64().unwrap() + parts[1].as_f64().unwrap();
    assert!((answers[1]["sums"][0].as_f64().unwrap() - sum).abs() < 1e-6);
    assert_eq!(answers[2]["ids"].as_array().unwrap().len(), 4);
    assert!(answers[3]["error"].as_str().unwrap().contains("tokenizer.json"));
    let pair = |answer: &Json| [0, 1].map(|i| answer["logprobs"][i].as_f64().unwrap());
    let (over_all, among) = (pair(&answers[4]), pair(&answers[5]));
    assert!((over_all[0] - (row[7] - normalizer)).abs() < 1e-4);
    assert!((among[0] - among[1] - (row[7] - row[9])).abs() < 1e-4);
    assert!((among[0].exp() + among[1].exp() - 1.0).abs() < 1e-5);
    let mut order = ids(&answers[6]["order"]);
    assert!(answers[6]["logprobs"][2].as_f64() == Some(0.0));
    order.sort_unstable();
    assert_eq!(order, [0, 1, 2]);
    let expected = among[0].exp() + 2.0 * among[1].exp();
    assert!((answers[7]["expected"].as_f64().unwrap() - expected).abs() < 1e-4);
    assert_eq!(answers[7]["greedy"].as_f64(), Some(if row[7] > row[9] { 1.0 } else { 2.0 }));
    assert_eq!(answers[8]["mean"].as_array().unwrap().len(), 32);
    assert!(answers[9]["total"].as_u64() > answers[9]["weights"].as_u64());
}

#[test]
fn bad_requests_are_answered_and_the_next_one_is_served() {
    let llm = Llm::open(&golden("tiny"), DeviceChoice::Cpu).unwrap();
    let long: Vec<u32> = vec![1; 129];
    let bad = [
        ("{", "JSON"),
        ("", "JSON"),
        ("[1]", "object"),
        (r#"{"ids":[1]}"#, "`op`"),
        (r#"{"op":7}"#, "`op`"),
        (r#"{"op":"sing"}"#, "tokenize, decode, chat, logits, score, generate"),
        (r#"{"op":"logits","ids":[]}"#, "at least 1"),
        (r#"{"op":"logits","ids":[64]}"#, "0 to 63"),
        (r#"{"op":"logits","ids":[-1]}"#, "u32"),
        (r#"{"op":"logits","ids":[1],"probe":[64]}"#, "0 to 63"),
        (r#"{"op":"logits","ids":[1],"text":"x"}"#, "one of the two"),
        (r#"{"op":"logits"}"#, "one of the two"),
        (r#"{"op":"logits","ids":[1],"tops":3}"#, "expected one of"),
        (r#"{"op":"score","ids":[1]}"#, "continuations"),
        (r#"{"op":"score","ids":[1],"continuations":[[]]}"#, "at least 1"),
        (r#"{"op":"score","ids":[],"continuations":[[1]]}"#, "at least 1"),
        (r#"{"op":"generate","ids":[1],"max_new":128}"#, "128 tokens"),
        (r#"{"op":"generate","ids":[1],"max_new":18446744073709551615}"#, "128 tokens"),
        (r#"{"op":"chat","messages":[]}"#, "tokenizer.json"),
        (r#"{"op":"labels","ids":[1],"labels":[64]}"#, "0 to 63"),
        (r#"{"op":"rank","ids":[1]}"#, "one of the two"),
        (r#"{"op":"rank","ids":[1],"titles":["x"]}"#, "tokenizer.json"),
        (r#"{"op":"rank","ids":[1],"candidates":[[64],[1]]}"#, "0 to 63"),
        (r#"{"op":"rate","ids":[1],"ratings":[1,2]}"#, "tokenizer.json"),
        (r#"{"op":"rate","ids":[1],"ratings":[[1,[3]],[2,[3]]]}"#, "told apart"),
        (r#"{"op":"rate","ids":[1],"ratings":["x"]}"#, "[value, [ids]]"),
        (r#"{"op":"hidden","ids":[]}"#, "at least 1"),
        (r#"{"op":"memory","x":1}"#, "unknown field"),
    ];
    let mut lines: Vec<String> = bad.iter().map(|(line, _)| (*line).to_owned()).collect();
    lines.push(json!({"op": "logits", "ids": long}).to_string());
    lines.push(r#"{"op":"logits","ids":[1]}"#.to_owned());
    let answers = ask(&llm, &lines);
    for (answer, (line, words)) in answers.iter().zip(bad) {
        let error = answer["error"].as_str().unwrap_or_else(|| panic!("{line} was served: {answer}"));
        assert!(error.contains(words), "{line}: {error}");
    }
    assert!(answers[bad.len()]["error"].as_str().unwrap().contains("context of 128 tokens"));
    assert_eq!(answers[bad.len() + 1]["top"].as_array().unwrap().len(), 20);
}

#[test]
fn text_that_is_no_utf8_is_an_error_too() {
    let llm = Llm::open(&golden("tiny"), DeviceChoice::Cpu).unwrap();
    let mut output = Vec::new();
    serve(&llm, &b"\xff\xfe\n{\"op\":\"logits\",\"ids\":[1],\"top\":1}"[..], &mut output).unwrap();
    let lines: Vec<String> = String::from_utf8(output).unwrap().lines().map(str::to_owned).collect();
    assert!(lines[0].contains("error") && lines[1].contains("logsumexp"), "{lines:?}");
}

#[test]
fn the_golden_files_are_answered_in_their_own_words() {
    let Some(llm) = model("the_golden_files_are_answered_in_their_own_words") else { return };
    let chat = &golden_json("tokenize.json")["chat"][1];
    let prompt = &golden_json("logits.json")[2];
    let answers = ask(
        &llm,
        &[
            json!({"op": "tokenize", "text": "Title with <|im_end|> inside", "special": true}).to_string(),
            json!({"op": "tokenize", "text": "Title with <|im_end|> inside", "special": false}).to_string(),
            json!({"op": "decode", "ids": [10813, 232]}).to_string(),
            json!({"op": "chat", "messages": chat["messages"]}).to_string(),
            json!({"op": "logits", "text": prompt["text"], "top": 20}).to_string(),
            json!({"op": "generate", "text": prompt["text"], "max_new": 3, "stop_at_end": true}).to_string(),
            json!({"op": "rank", "text": "The planets of the Sun, the nearest first:\n1. Mercury\n2. Venus\n",
                   "titles": ["Mars", "Mar", "Earth", "Mars"]})
            .to_string(),
            json!({"op": "rate", "text": "The best film of all time. Stars (1 to 5):", "ratings": [1, 2, 3.5, 4, 5]})
                .to_string(),
        ],
    );
    assert_eq!(answers[0]["ids"], json!([16491, 351, 216, 2, 2972]));
    assert_eq!(answers[1]["ids"], json!([16491, 351, 2067, 108, 306, 79, 486, 108, 46, 2972]));
    assert_eq!(answers[2]["text"], "\u{fffd}");
    assert_eq!(answers[3]["text"], chat["text"]);
    assert_eq!(ids(&answers[3]["ids"]), ids(&chat["ids"]));
    let firsts = |list: &Json| list.as_array().unwrap().iter().map(|p| p[0].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!(firsts(&answers[4]["top"])[..8], firsts(&prompt["top20"])[..8]);
    assert_eq!(answers[5]["ids"][0], prompt["top20"][0][0]);
    assert!(!answers[5]["text"].as_str().unwrap().is_empty());
    let order = ids(&answers[6]["order"]);
    let place = |candidate: u32| order.iter().position(|o| *o == candidate).unwrap();
    assert!(order.len() == 4 && place(0) < place(3), "{order:?}");
    assert!(place(0) < place(1), "Mars is likelier than Mar: {order:?}");
    let rating = answers[7]["expected"].as_f64().unwrap();
    assert!((1.0..5.0).contains(&rating), "{rating}");
}
