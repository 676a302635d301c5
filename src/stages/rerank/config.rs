//! The keys of `kind = "rerank"`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::llm::Precision;
use crate::llm::remote::{EngineConfig, EngineKind, RemoteSpec};

/// How an answer is read from the LLM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// One prefill; the candidates are ranked by the log-probabilities of their letters. Needs
    /// prompts with `candidate_style = "letters"`.
    #[default]
    Label,
    /// The log-probability of each candidate's title given the prompt. Needs prompts with
    /// `candidate_style = "titles"`.
    Likelihood,
    /// The LLM writes the order, as in the paper: in this process it can write nothing but candidates that are left; what a
    /// server writes is read strictly, repaired where that is safe, and given up where it is not.
    Generate,
    /// The LLM rates each candidate, and the ratings are sorted (pointwise). Needs the prompts of a `prompt_ratings` stage,
    /// which ask for one rating each, or prompts with `candidate_style = "titles"`, where the rating is written behind each
    /// title; in this process only.
    Rating,
}

impl Mode {
    /// As the pipeline file writes it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Mode::Label => "label",
            Mode::Likelihood => "likelihood",
            Mode::Generate => "generate",
            Mode::Rating => "rating",
        }
    }

    /// The mode of that name. Errors (exit 78): there is none.
    pub fn parse(name: &str) -> Result<Mode> {
        let all = [Mode::Label, Mode::Likelihood, Mode::Generate, Mode::Rating];
        all.into_iter().find(|mode| mode.name() == name).ok_or_else(|| {
            Error::spec(format!("`mode` is `{name}`")).with_help("it is one of label, likelihood, generate, rating")
        })
    }
}

/// What a title's log-probability is divided by or compared with (mode `likelihood`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Normalise {
    /// Sum over the title's tokens: favours short titles.
    Sum,
    /// Mean over the title's tokens.
    #[default]
    Mean,
    /// Sum, less the title's log-probability after an empty prompt: favours what the history explains.
    Unconditional,
}

/// Which number a rating is (mode `rating`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RatedBy {
    /// The mean of the ratings, weighted by their probability.
    #[default]
    Expected,
    /// What greedy writing gives, as in the paper: at each token the likeliest one that leads to a rating.
    Greedy,
}

/// Which users are asked first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Users with the fewest interactions first (the LLM weighs most for them, eq. 7), ties by user id.
    #[default]
    TailFirst,
    /// A seeded sample, for calibration: every part of the long tail is in it.
    Random,
}

/// How much the LLM may be asked. The smallest of the limits counts; no limit asks everyone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// At most so many users.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<u64>,
    /// At most so many prompt tokens; a user is asked only when all of their prompts fit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// At most so many minutes of the LLM. Before the stage starts they are turned into users, by the rate at which earlier
    /// nights were asked (the first night asks a few users to measure it), so what is published depends on no clock but
    /// through that number. `tailfuse run --budget` replaces it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minutes: Option<f64>,
}

/// When an earlier order of the LLM is kept in place of a new one. Users who keep theirs take nothing of the budget.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Reuse {
    /// Share of today's shortlist that the LLM must have ordered then, above 0 and at most 1; default .8.
    #[serde(default = "default_overlap")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub overlap: f64,
    /// Age of that answer in days at most; default 14.
    #[serde(default = "default_days")]
    pub days: f64,
}

fn default_overlap() -> f64 {
    0.8
}
fn default_days() -> f64 {
    14.0
}

/// Config of `kind = "rerank"`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RerankConfig {
    /// Table of prompts: output `prompts` of a `prompt` stage.
    pub prompts: String,
    /// Table with `user_id` and `interactions`, N(u): decides who is asked first.
    pub long_tail: String,
    /// Users without a prompt and why: output `skipped` of the `prompt` stage. They are passed on in `not_asked`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// The LLM: a name from the catalogue, a GGUF file or a Hugging Face folder. The same as in the `prompt` stage.
    /// A server has its model in `engine`; of this one only the chat template is read then, where mode `likelihood` wants it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Where the LLM runs: in this process by default, or on a server.
    #[serde(default, skip_serializing_if = "is_local")]
    pub engine: EngineConfig,
    /// How the LLM's order is read.
    #[serde(default)]
    pub mode: Mode,
    /// A calibration: its mode in place of `mode`. Where it found the LLM to be worth nothing (a1 = 0) nobody is asked, with
    /// the reason `a1_is_0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<String>,
    /// Mode `likelihood`: how titles of different length are made comparable.
    #[serde(default)]
    pub normalise: Normalise,
    /// Mode `rating`: what the LLM may answer; default 1 to 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratings: Option<Vec<f64>>,
    /// Mode `rating`: `expected` (the default), the mean of the ratings by their probability, or `greedy`, as in the paper.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rated_by: RatedBy,
    /// How exactly the engine in this process computes its linear layers: `auto` (the default: in 16-bit integers where the CPU
    /// multiplies them quicker, else in f32), `f32`, `int16` or `int8`. An answer given at one of the last three is not taken
    /// for another's.
    #[serde(default, skip_serializing_if = "is_default")]
    pub precision: Precision,
    /// How much may be asked.
    #[serde(default)]
    pub budget: Budget,
    /// Who is asked first.
    #[serde(default)]
    pub order: Order,
    /// Keeps earlier orders of users who did nothing since: `reuse = { overlap = 0.8, days = 14 }`. Off by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reuse: Option<Reuse>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn is_local(engine: &EngineConfig) -> bool {
    *engine == EngineConfig::default()
}

impl RerankConfig {
    /// Checks what the types do not; gives the server, where there is one.
    pub(super) fn resolve(&self) -> Result<Option<RemoteSpec>> {
        let remote = self.engine.resolve()?;
        if self.engine.kind == EngineKind::Local && self.model.is_none() {
            return Err(Error::spec("`model` is missing")
                .with_help("name the LLM as in the `prompt` stage, or a server: engine = { kind = \"openai\", url = ..., model = ... }"));
        }
        if remote.is_some() && self.mode == Mode::Rating {
            return Err(Error::spec("mode = \"rating\" is for the engine in this process")
                .with_help("use mode = \"label\", \"likelihood\" or \"generate\" with a server"));
        }
        if remote.is_some() && self.mode == Mode::Likelihood && self.normalise == Normalise::Unconditional {
            return Err(Error::spec("normalise = \"unconditional\" is for the engine in this process")
                .with_help("use \"mean\" or \"sum\" with a server"));
        }
        if self.mode != Mode::Rating && self.rated_by != RatedBy::default() {
            return Err(Error::spec("`rated_by` is for mode = \"rating\"").with_help("remove the key, or set the mode"));
        }
        if remote.is_some() && self.precision != Precision::default() {
            return Err(Error::spec("`precision` is for the engine in this process").with_help("remove the key"));
        }
        if let Some(minutes) = self.budget.minutes.filter(|m| !(m.is_finite() && *m > 0.0)) {
            return Err(Error::spec(format!("`budget` has minutes = {minutes}")).with_help("give a number above 0"));
        }
        if let Some(ratings) = &self.ratings {
            let sorted = ratings.windows(2).all(|w| w[0] < w[1]) && ratings.iter().all(|r| r.is_finite());
            if self.mode != Mode::Rating || ratings.len() < 2 || !sorted {
                return Err(Error::spec("`ratings` is a list of two numbers or more, rising, for mode = \"rating\""));
            }
        }
        if let Some(Reuse { overlap, days }) = self.reuse
            && !(overlap > 0.0 && overlap <= 1.0 && days.is_finite() && days > 0.0)
        {
            return Err(Error::spec(format!("`reuse` has overlap {overlap} and days {days}"))
                .with_help("overlap is above 0 and at most 1, days above 0; the defaults are 0.8 and 14"));
        }
        Ok(remote)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(more: &str) -> Result<Option<RemoteSpec>> {
        let text = format!("prompts = \"p\"\nlong_tail = \"t\"\n{more}");
        toml::from_str::<RerankConfig>(&text).unwrap().resolve()
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        const SERVER: &str = "engine = { kind = \"openai\", url = \"http://x/v1\", model = \"m\" }";
        assert!(config("model = \"m\"").unwrap().is_none());
        assert!(config(SERVER).unwrap().is_some());
        assert!(config(&format!("{SERVER}\nmodel = \"m\"\nmode = \"generate\"")).unwrap().is_some());
        for (more, word) in [
            (String::new(), "`model` is missing"),
            (format!("{SERVER}\nmode = \"rating\""), "rating"),
            (format!("{SERVER}\nmode = \"likelihood\"\nnormalise = \"unconditional\""), "unconditional"),
            ("model = \"m\"\nreuse = { overlap = 0.0 }".into(), "overlap"),
            ("model = \"m\"\nreuse = { overlap = 1.5 }".into(), "overlap"),
            ("model = \"m\"\nreuse = { days = -1.0 }".into(), "days"),
            ("model = \"m\"\nratings = [1.0, 2.0]".into(), "ratings"),
            ("model = \"m\"\nrated_by = \"greedy\"".into(), "rated_by"),
            (format!("{SERVER}\nprecision = \"f32\""), "precision"),
            ("model = \"m\"\nmode = \"rating\"\nratings = [2.0, 1.0]".into(), "ratings"),
        ] {
            let error = config(&more).unwrap_err();
            assert!(error.fault.exit_code() == 78 && error.message.contains(word), "{more}: {error}");
        }
    }
}
