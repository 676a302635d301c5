//! What a pipeline file says of the engine that answers, and what it means.
//!
//! In: the `engine` table of a stage. Out: `None` for the engine in this process, or a [`RemoteSpec`] without options.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use url::Url;

use crate::error::{Error, Result};

/// Where the LLM runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EngineKind {
    /// In this process: the weights that the stage's `model` names.
    #[default]
    Local,
    /// On a server that speaks the OpenAI protocol.
    Openai,
}

/// What a server understands besides the common protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Dialect {
    /// The common protocol: log-probabilities of chats, JSON schemas, `echo` of completions.
    #[default]
    Openai,
    /// vLLM: also the log-probabilities of a prompt (`prompt_logprobs`).
    Vllm,
    /// llama.cpp's server: no log-probabilities of a prompt.
    LlamaCpp,
    /// Text Generation Inference: JSON schemas in a form of its own, no log-probabilities of a prompt.
    Tgi,
}

/// How mode `generate` asks for its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Structured {
    /// By a JSON schema that only the candidates fit.
    #[default]
    JsonSchema,
    /// As text; the order is read from whatever comes.
    Text,
}

/// What tokens cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// A million prompt tokens, in any currency.
    #[serde(default)]
    pub prompt: f64,
    /// A million tokens of answers, in the same currency.
    #[serde(default)]
    pub completion: f64,
}

/// Which LLM answers, and how it is asked. All keys but `kind` belong to `kind = "openai"`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EngineConfig {
    /// `local` (default): in this process. `openai`: any server that speaks the OpenAI protocol.
    #[serde(default)]
    pub kind: EngineKind,
    /// Where the server's API begins, for instance `http://localhost:8000/v1`. Without user, password or query.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// The model's name on that server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Anything that tells two sets of weights of the same name apart. Change it when the server got other weights:
    /// answers of the old ones are no longer used then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// `openai` (default), `vllm`, `llama-cpp` or `tgi`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dialect: Option<Dialect>,
    /// The NAME of the environment variable that holds the API key. The key itself never belongs in a pipeline file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_env: Option<String>,
    /// Requests in flight at most; default 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub concurrency: Option<usize>,
    /// Seconds that one request may take; default 120.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<f64>,
    /// Seconds that the stage may ask in all; users without an answer by then are `fallback` with the reason `deadline`.
    /// No limit by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_seconds: Option<f64>,
    /// How often a request is tried again after a time-out, a lost connection, an unreadable answer, 429 or 5xx; default 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 100))]
    pub retries: Option<usize>,
    /// Seconds before the first of these; each one waits twice as long as the one before it, up to a minute, plus a
    /// random part of that, and never less than the server's `Retry-After` says; default .5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backoff_seconds: Option<f64>,
    /// After so many requests in a row whose tries all failed, the server is taken for down: the stage stops with exit
    /// code 75, and what was answered is kept. Default 20.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub give_up_after: Option<usize>,
    /// Mode `label`: how many of the likeliest tokens the server is asked for; letters that are not among them rank last.
    /// Default 20, the most that hosted servers give; llama.cpp takes more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub top_logprobs: Option<u32>,
    /// Mode `generate`: tokens of an answer at most; by default enough for all candidates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_tokens: Option<u32>,
    /// Mode `generate`: `json-schema` (default) or `text`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub structured: Option<Structured>,
    /// Price of a million tokens, for the counter `llm_cost`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price: Option<Price>,
}

/// A remote engine with everything decided.
#[derive(Clone, Debug, PartialEq)]
pub struct RemoteSpec {
    /// Base URL without a slash at the end.
    pub url: String,
    /// The model's name on the server.
    pub model: String,
    /// Revision, or empty.
    pub revision: String,
    /// What the server understands.
    pub dialect: Dialect,
    /// Name of the environment variable with the key.
    pub api_key_env: Option<String>,
    /// Requests in flight.
    pub concurrency: usize,
    /// Bound of one try.
    pub timeout: Duration,
    /// Bound of all.
    pub deadline: Option<Duration>,
    /// Tries after the first.
    pub retries: usize,
    /// Wait before the first of them.
    pub backoff: Duration,
    /// Failed requests in a row that mean "down".
    pub give_up_after: usize,
    /// Likeliest tokens asked for.
    pub top_logprobs: u32,
    /// Tokens of a generated answer.
    pub max_tokens: Option<u32>,
    /// How answers are asked for.
    pub structured: Structured,
    /// Prices.
    pub price: Price,
}

impl EngineConfig {
    /// What the config means: `None` is the engine in this process.
    ///
    /// # Errors
    /// Exit 78: a key that this kind does not read, a missing one, a URL that carries credentials, a number out of range.
    /// No message shows the URL, since a mistyped one may hold a secret.
    pub fn resolve(&self) -> Result<Option<RemoteSpec>> {
        if self.kind == EngineKind::Local {
            return match *self == EngineConfig::default() {
                true => Ok(None),
                false => Err(Error::spec("`engine` has settings of a server, and its kind is `local`")
                    .with_help("set engine.kind = \"openai\", or remove the other keys")),
            };
        }
        let missing = |key: &str, example: &str| {
            Error::spec(format!("`engine.{key}` is missing")).with_help(format!("for instance {key} = \"{example}\""))
        };
        let url = checked_url(self.url.as_deref().ok_or_else(|| missing("url", "http://localhost:8000/v1"))?)?;
        let model = self.model.clone().filter(|m| !m.is_empty());
        let spec = RemoteSpec {
            url,
            model: model.ok_or_else(|| missing("model", "meta-llama/Llama-3.1-8B-Instruct"))?,
            revision: self.revision.clone().unwrap_or_default(),
            dialect: self.dialect.unwrap_or_default(),
            api_key_env: self.api_key_env.clone(),
            concurrency: self.concurrency.unwrap_or(8),
            timeout: seconds("timeout_seconds", self.timeout_seconds.unwrap_or(120.0))?,
            deadline: self.deadline_seconds.map(|s| seconds("deadline_seconds", s)).transpose()?,
            retries: self.retries.unwrap_or(5),
            backoff: seconds("backoff_seconds", self.backoff_seconds.unwrap_or(0.5))?,
            give_up_after: self.give_up_after.unwrap_or(20),
            top_logprobs: self.top_logprobs.unwrap_or(20),
            max_tokens: self.max_tokens,
            structured: self.structured.unwrap_or_default(),
            price: self.price.unwrap_or_default(),
        };
        for (key, value) in [
            ("concurrency", spec.concurrency),
            ("give_up_after", spec.give_up_after),
            ("top_logprobs", spec.top_logprobs as usize),
            ("max_tokens", spec.max_tokens.map_or(1, |m| m as usize)),
        ] {
            if value == 0 {
                return Err(Error::spec(format!("`engine.{key}` is 0")).with_help("it must be at least 1"));
            }
        }
        Ok(Some(spec))
    }
}

impl RemoteSpec {
    /// What an answer depends on: part of fingerprints and of the ledger's keys. Neither the place of the server nor
    /// how patiently it is asked is in it, and nothing secret.
    pub fn identity(&self) -> Value {
        json!({
            "kind": "openai",
            "model": self.model,
            "revision": self.revision,
            "dialect": self.dialect,
            "top_logprobs": self.top_logprobs,
            "max_tokens": self.max_tokens,
            "structured": self.structured,
        })
    }

    /// A name of the weights, for the ledger: as good as the name that the server gives them.
    pub fn weights(&self) -> String {
        match self.revision.is_empty() {
            true => format!("openai:{}", self.model),
            false => format!("openai:{}@{}", self.model, self.revision),
        }
    }

    /// What tokens cost.
    pub fn cost(&self, prompt_tokens: u64, completion_tokens: u64) -> f64 {
        (prompt_tokens as f64 * self.price.prompt + completion_tokens as f64 * self.price.completion) / 1e6
    }
}

fn seconds(key: &str, value: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(value)
        .ok()
        .filter(|d| !d.is_zero())
        .ok_or_else(|| Error::spec(format!("`engine.{key}` is {value}")).with_help("it is a number of seconds above 0"))
}

fn checked_url(text: &str) -> Result<String> {
    let help =
        "write it like http://localhost:8000/v1; a key belongs in an environment variable, whose name is `api_key_env`";
    let url = Url::parse(text).map_err(|e| Error::spec(format!("`engine.url` is no URL: {e}")).with_help(help))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(Error::spec("`engine.url` is not an http:// or https:// address").with_help(help));
    }
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        return Err(Error::spec("`engine.url` has a user, a password, a query or a fragment").with_help(help));
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> EngineConfig {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn local_is_the_default_and_takes_no_settings_of_a_server() {
        assert_eq!(EngineConfig::default().resolve().unwrap(), None);
        let error = config("kind = \"local\"\nconcurrency = 3").resolve().unwrap_err();
        assert_eq!(error.fault.exit_code(), 78);
    }

    #[test]
    fn a_server_needs_an_address_and_a_model() {
        for text in
            ["kind = \"openai\"", "kind = \"openai\"\nurl = \"http://x/v1\"", "kind = \"openai\"\nmodel = \"m\""]
        {
            let error = config(text).resolve().unwrap_err();
            assert!(error.fault.exit_code() == 78 && error.message.contains("missing"), "{error}");
        }
        let spec = config("kind = \"openai\"\nurl = \"http://x:1/v1/\"\nmodel = \"m\"").resolve().unwrap().unwrap();
        assert_eq!((spec.url.as_str(), spec.weights().as_str()), ("http://x:1/v1", "openai:m"));
        assert_eq!((spec.concurrency, spec.retries, spec.timeout), (8, 5, Duration::from_secs(120)));
    }

    #[test]
    fn secrets_in_a_url_are_refused_and_not_repeated() {
        for url in
            ["http://me:hunter2@x/v1", "https://x/v1?key=hunter2", "ftp://hunter2/v1", "hunter2", "http://x/v1#hunter2"]
        {
            let config = EngineConfig {
                kind: EngineKind::Openai,
                url: Some(url.into()),
                model: Some("m".into()),
                ..Default::default()
            };
            let error = config.resolve().unwrap_err();
            assert_eq!(error.fault.exit_code(), 78, "{url}");
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn numbers_out_of_range_are_named() {
        for text in [
            "concurrency = 0",
            "timeout_seconds = 0",
            "deadline_seconds = -1",
            "backoff_seconds = nan",
            "max_tokens = 0",
        ] {
            let text = format!("kind = \"openai\"\nurl = \"http://x/v1\"\nmodel = \"m\"\n{text}");
            let error = config(&text).resolve().unwrap_err();
            assert!(error.fault.exit_code() == 78 && error.message.contains("engine."), "{error}");
        }
    }

    #[test]
    fn the_place_and_the_patience_are_no_part_of_an_answer() {
        let base = config("kind = \"openai\"\nurl = \"http://x/v1\"\nmodel = \"m\"").resolve().unwrap().unwrap();
        let same = config(
            "kind = \"openai\"\nurl = \"https://y:9/api\"\nmodel = \"m\"\nretries = 0\nconcurrency = 2\napi_key_env = \"K\"\n\
             timeout_seconds = 1\nprice = { prompt = 2.0 }",
        );
        assert_eq!(same.resolve().unwrap().unwrap().identity(), base.identity());
        for other in ["revision = \"2\"", "dialect = \"vllm\"", "structured = \"text\"", "top_logprobs = 5"] {
            let text = format!("kind = \"openai\"\nurl = \"http://x/v1\"\nmodel = \"m\"\n{other}");
            assert_ne!(config(&text).resolve().unwrap().unwrap().identity(), base.identity(), "{other}");
        }
    }

    #[test]
    fn cost_is_by_the_million() {
        let mut spec = config("kind = \"openai\"\nurl = \"http://x/v1\"\nmodel = \"m\"").resolve().unwrap().unwrap();
        spec.price = Price { prompt: 0.5, completion: 2.0 };
        assert_eq!(spec.cost(1_000_000, 500_000), 1.5);
    }
}
