//! The instructions that the LLM is tuned on: tasks, templates, one text per task.
//!
//! In: titles (with ratings or side information where the task has them). Out: the user message of one instruction.
//! The tasks are those of arXiv 2401.13870: pairwise and list preference and side information (section 4.2), top-k ranking
//! and rating with and without the augmented fields (section 4.3), mixed for tuning (section 4.5). `ranking` uses the
//! templates of the `prompt` stage ([`super::Templates`]), so that the LLM is tuned on what it will be asked.

use std::collections::BTreeMap;

use minijinja::{Environment, UndefinedBehavior, Value, context};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What an instruction asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum InstructionTask {
    /// Which of two items the user prefers: the user's next train item, and one that is unseen in train.
    Pairwise,
    /// Which item of a list the user would like most: the next train item among unseen ones.
    List,
    /// A missing column of an item, from items whose column is known.
    SideInfo,
    /// The order of a candidate list, as the `prompt` stage asks for it; with and without augmented fields.
    Ranking,
    /// The rating of one item, with and without augmented fields.
    Rating,
}

impl InstructionTask {
    /// All tasks, in the order of the docs.
    pub const ALL: [InstructionTask; 5] = [
        InstructionTask::Pairwise,
        InstructionTask::List,
        InstructionTask::SideInfo,
        InstructionTask::Ranking,
        InstructionTask::Rating,
    ];

    /// Its name in the pipeline file and in tables.
    pub fn name(self) -> &'static str {
        match self {
            InstructionTask::Pairwise => "pairwise",
            InstructionTask::List => "list",
            InstructionTask::SideInfo => "side_info",
            InstructionTask::Ranking => "ranking",
            InstructionTask::Rating => "rating",
        }
    }

    /// The built-in template of the user message; none for `ranking`.
    fn built_in(self) -> Option<&'static str> {
        match self {
            InstructionTask::Pairwise => Some(include_str!("../../prompts/instruct.pairwise.jinja")),
            InstructionTask::List => Some(include_str!("../../prompts/instruct.list.jinja")),
            InstructionTask::SideInfo => Some(include_str!("../../prompts/instruct.side_info.jinja")),
            InstructionTask::Rating => Some(include_str!("../../prompts/instruct.rating.jinja")),
            InstructionTask::Ranking => None,
        }
    }
}

/// The built-in system message of all tasks but `ranking`.
const SYSTEM: &str = include_str!("../../prompts/instruct.system.jinja");

/// A title, and what is told of it: a rating, or a column's value. Empty where nothing is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// The clean title.
    pub title: &'a str,
    /// What is told of it.
    pub value: String,
}

/// What an instruction is filled with; all titles are clean.
#[derive(Clone, Copy, Debug, Default)]
pub struct InstructionFields<'a> {
    /// What the items are, in the plural.
    pub noun: &'a str,
    /// The user's history (of `side_info`: the examples), oldest first.
    pub history: &'a [Line<'a>],
    /// The candidates in the order shown; one for `side_info` and `rating`.
    pub candidates: &'a [&'a str],
    /// The similar user's history, oldest first; empty where there is none.
    pub similar: &'a [Line<'a>],
    /// What the recommender says; empty where there is nothing.
    pub prediction: &'a [String],
    /// `side_info`: name of the column.
    pub field: &'a str,
    /// `rating`: least and greatest rating.
    pub range: (&'a str, &'a str),
}

/// The compiled templates of all tasks but `ranking`.
#[derive(Debug)]
pub struct InstructionTemplates {
    environment: Environment<'static>,
}

impl InstructionTemplates {
    /// The built-in templates; those of `own` (task -> source) in their place.
    ///
    /// # Errors
    /// A syntax error, a name that is not one of the fields, a template that leaves out a candidate or the history
    /// (exit 78).
    pub fn new(own: &BTreeMap<InstructionTask, String>) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        let mut add = |name: &'static str, source: String| {
            environment.add_template_owned(name, source).map_err(|e| template_error(name, &e))
        };
        add("system", SYSTEM.to_owned())?;
        for task in InstructionTask::ALL {
            if let Some(built_in) = task.built_in() {
                add(task.name(), own.get(&task).cloned().unwrap_or_else(|| built_in.to_owned()))?;
            }
        }
        let templates = InstructionTemplates { environment };
        own.keys().try_for_each(|task| templates.try_sample(*task))?;
        Ok(templates)
    }

    fn try_sample(&self, task: InstructionTask) -> Result<()> {
        let line = |title| Line { title, value: "<value>".to_owned() };
        let history = [line("<first of the history>"), line("<second of the history>")];
        let one = matches!(task, InstructionTask::SideInfo | InstructionTask::Rating);
        let candidates = &["<first candidate>", "<second candidate>"][..if one { 1 } else { 2 }];
        for extra in [&history[..1], &[]] {
            let fields = InstructionFields {
                noun: "things",
                history: &history,
                candidates,
                similar: extra,
                prediction: &extra.iter().map(|l| l.value.clone()).collect::<Vec<_>>(),
                field: "<column>",
                range: ("<least>", "<greatest>"),
            };
            let text = self.user(task, &fields)?;
            let mut shown = history.iter().map(|l| l.title).chain(candidates.iter().copied());
            if let Some(title) = shown.find(|t| !text.contains(t)) {
                let what = &title[1..title.len() - 1];
                return Err(Error::spec(format!("the template of `{}` does not show the {what}", task.name()))
                    .with_help(format!("start from prompts/instruct.{}.jinja", task.name())));
            }
        }
        Ok(())
    }

    /// The system message.
    ///
    /// # Errors
    /// The template fails (exit 78).
    pub fn system(&self, noun: &str) -> Result<String> {
        self.render("system", context! { noun })
    }

    /// The user message of a task other than `ranking`.
    ///
    /// # Errors
    /// The template fails (exit 78).
    pub fn user(&self, task: InstructionTask, fields: &InstructionFields<'_>) -> Result<String> {
        let lines = |lines: &[Line<'_>]| -> Value {
            lines.iter().map(|l| context! { title => l.title, value => l.value.as_str() }).collect()
        };
        self.render(
            task.name(),
            context! {
                noun => fields.noun,
                history => lines(fields.history),
                candidates => fields.candidates.iter().copied().collect::<Value>(),
                similar => lines(fields.similar),
                prediction => fields.prediction.iter().map(String::as_str).collect::<Value>(),
                field => fields.field,
                lowest => fields.range.0,
                highest => fields.range.1,
            },
        )
    }

    fn render(&self, name: &str, fields: Value) -> Result<String> {
        let template = self.environment.get_template(name).map_err(|e| template_error(name, &e))?;
        template.render(fields).map_err(|e| template_error(name, &e))
    }
}

fn template_error(name: &str, error: &minijinja::Error) -> Error {
    let line = error.line().map(|l| format!(" in line {l}")).unwrap_or_default();
    let detail = error.detail().map(|d| format!(" ({d})")).unwrap_or_default();
    Error::spec(format!("the template of `{name}` fails{line}: {}{detail}", error.kind())).with_help(
        "a template may use noun, history and similar (each with title and value), candidates, prediction, field, lowest and highest",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines<'a>(of: &[(&'a str, &str)]) -> Vec<Line<'a>> {
        of.iter().map(|&(title, value)| Line { title, value: value.to_owned() }).collect()
    }

    #[test]
    fn whole_instructions() {
        let templates = InstructionTemplates::new(&BTreeMap::new()).unwrap();
        let history = lines(&[("Heat (1995)", "4"), ("Fargo (1996)", "3.5")]);
        let similar = lines(&[("Clerks (1994)", "1")]);
        let fields = InstructionFields {
            noun: "films",
            history: &history,
            candidates: &["{{ noun }} & <b>", "Babe (1995)"],
            similar: &similar,
            prediction: &["3.9".to_owned()],
            field: "genres",
            range: ("1", "5"),
        };
        let text = |task, fields: &InstructionFields<'_>| templates.user(task, fields).unwrap();
        assert!(templates.system("films").unwrap().contains("films"));
        insta::assert_snapshot!(text(InstructionTask::Pairwise, &fields), @r"
        Instruction: The history lists films that a user has chosen, the latest last. Which of the two candidates does the user prefer? Answer with its exact title.
        Interaction History: Heat (1995); Fargo (1996)
        Candidate Items:
        {{ noun }} & <b>
        Babe (1995)
        Output:
        ");
        assert!(text(InstructionTask::List, &fields).contains("like most"));
        let one = InstructionFields { candidates: &["Babe (1995)"], ..fields };
        insta::assert_snapshot!(text(InstructionTask::SideInfo, &one), @r"
        Instruction: The examples are films with their genres. Fill in the genres of the candidate. Answer with the genres only.
        Examples:
        Heat (1995): 4
        Fargo (1996): 3.5
        Candidate Item: Babe (1995)
        Output:
        ");
        insta::assert_snapshot!(text(InstructionTask::Rating, &one), @r"
        Instruction: The history lists films with the ratings that a user gave, from 1 to 5, the latest last. Which rating does the user give the candidate? Answer with the number only.
        Rating History: Heat (1995): 4; Fargo (1996): 3.5
        Candidate Item: Babe (1995)
        Similar User Rating History: Clerks (1994): 1
        Conventional Model Prediction: 3.9
        Output:
        ");
        let plain = text(InstructionTask::Rating, &InstructionFields { similar: &[], prediction: &[], ..one });
        assert!(!plain.contains("Similar") && !plain.contains("Conventional"), "{plain}");
    }

    #[test]
    fn own_templates_are_tried_first() {
        let own =
            |source: &str| InstructionTemplates::new(&BTreeMap::from([(InstructionTask::Pairwise, source.to_owned())]));
        assert!(own("{{ history }} {{ candidates }}").is_ok());
        for (source, words) in [
            ("{{ candidates }}", "does not show the first of the history"),
            ("{{ history }}", "does not show the first candidate"),
            ("{{ histroy }}", "fails in line 1"),
        ] {
            let error = own(source).unwrap_err();
            assert!(error.fault.exit_code() == 78 && error.message.contains(words), "{error}");
        }
    }
}
