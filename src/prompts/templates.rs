//! The templates of a prompt and what they may use.
//!
//! In: two Jinja sources (minijinja) and [`Fields`]. Out: the text of the system and of the user
//! message. The six fields of a top-k prompt, in order (arXiv 2401.13870, section 4.3):
//! instruction, interaction history, candidate items, similar user's interaction history,
//! conventional model prediction, output.
//!
//! The system template sees `noun` and `style` only, so it is the same for all users. The user
//! template sees, besides, `history`, `similar`, `prediction` (lists of titles, the last two empty
//! where switched off) and `candidates` (objects with `label` and `title`).

use minijinja::{Environment, UndefinedBehavior, Value, context};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The built-in system message of a top-k prompt.
pub const TOPK_SYSTEM: &str = include_str!("../../prompts/topk.system.jinja");
/// The built-in user message of a top-k prompt.
pub const TOPK_USER: &str = include_str!("../../prompts/topk.user.jinja");

/// Candidates that letters can name.
pub const LETTERS: usize = 26;

const SYSTEM: &str = "system";
const USER: &str = "user";

/// How candidates are listed and what the answer is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CandidateStyle {
    /// `A. Title`, one on each line; the answer is one letter. For `mode = "label"`; at most 26 candidates.
    #[default]
    Letters,
    /// The title alone, one on each line; the answer is titles. For `mode = "likelihood"` and `"generate"`.
    Titles,
}

/// The letter of the candidate in place `index` (0-based): A to Z.
pub fn label(index: usize) -> Option<char> {
    (index < LETTERS).then(|| char::from(b'A' + index as u8))
}

/// What a prompt is filled with; all titles are clean.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a> {
    /// What the items are, in the plural: `movies`.
    pub noun: &'a str,
    /// How candidates are listed.
    pub style: CandidateStyle,
    /// The user's history, oldest first.
    pub history: &'a [&'a str],
    /// The candidates in the order shown.
    pub candidates: &'a [&'a str],
    /// The similar user's history, oldest first; empty where there is none.
    pub similar: &'a [&'a str],
    /// The recommender's best titles, best first; empty where switched off.
    pub prediction: &'a [&'a str],
}

/// A compiled pair of templates.
#[derive(Debug)]
pub struct Templates {
    environment: Environment<'static>,
}

impl Templates {
    /// Compiles both templates and tries them on a sample.
    ///
    /// Errors (exit 78): a syntax error, a name that is not one of the fields, a user template
    /// that leaves out a candidate or the history.
    pub fn new(system: &str, user: &str) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        for (name, source) in [(SYSTEM, system), (USER, user)] {
            environment.add_template_owned(name, source.to_owned()).map_err(|e| template_error(name, &e))?;
        }
        let templates = Templates { environment };
        templates.try_sample()?;
        Ok(templates)
    }

    fn try_sample(&self) -> Result<()> {
        for style in [CandidateStyle::Letters, CandidateStyle::Titles] {
            self.system("things", style)?;
            for extra in [&["<sample of a similar user>"][..], &[]] {
                let fields = Fields {
                    noun: "things",
                    style,
                    history: &["<first of the history>", "<second of the history>"],
                    candidates: &["<first candidate>", "<second candidate>"],
                    similar: extra,
                    prediction: extra,
                };
                let text = self.user(&fields)?;
                if let Some(title) = fields.history.iter().chain(fields.candidates).find(|t| !text.contains(**t)) {
                    return Err(Error::spec(format!(
                        "the user template does not show the {}",
                        &title[1..title.len() - 1]
                    ))
                    .with_help(
                        "it must show every title of `history` and `candidates`; start from prompts/topk.user.jinja",
                    ));
                }
            }
        }
        Ok(())
    }

    /// The system message: the same for all users.
    pub fn system(&self, noun: &str, style: CandidateStyle) -> Result<String> {
        self.render(SYSTEM, context! { noun => noun, style => style_name(style) })
    }

    /// The user message.
    pub fn user(&self, fields: &Fields<'_>) -> Result<String> {
        let list = |titles: &[&str]| titles.iter().copied().collect::<Value>();
        let candidates: Value = (fields.candidates.iter().enumerate())
            .map(|(index, &title)| {
                // Only a list of letters has labels, and the stage refuses one that is too long.
                let label = label(index).map(String::from).unwrap_or_default();
                context! { label => label, title => title }
            })
            .collect();
        self.render(
            USER,
            context! {
                noun => fields.noun,
                style => style_name(fields.style),
                history => list(fields.history),
                candidates => candidates,
                similar => list(fields.similar),
                prediction => list(fields.prediction),
            },
        )
    }

    fn render(&self, name: &str, fields: Value) -> Result<String> {
        let template = self.environment.get_template(name).map_err(|e| template_error(name, &e))?;
        template.render(fields).map_err(|e| template_error(name, &e))
    }
}

fn style_name(style: CandidateStyle) -> &'static str {
    match style {
        CandidateStyle::Letters => "letters",
        CandidateStyle::Titles => "titles",
    }
}

fn template_error(name: &str, error: &minijinja::Error) -> Error {
    let line = error.line().map(|l| format!(" in line {l}")).unwrap_or_default();
    let detail = error.detail().map(|d| format!(" ({d})")).unwrap_or_default();
    Error::spec(format!("the {name} template fails{line}: {}{detail}", error.kind())).with_help(
        "a template may use noun, style and, in the user template, history, candidates, similar and prediction",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built_in() -> Templates {
        Templates::new(TOPK_SYSTEM, TOPK_USER).unwrap()
    }

    const FIELDS: Fields<'static> = Fields {
        noun: "movies",
        style: CandidateStyle::Letters,
        history: &["Toy Story (1995)", "Heat (1995)"],
        candidates: &["Fargo (1996)", "Babe (1995)"],
        similar: &["Clerks (1994)"],
        prediction: &["Babe (1995)"],
    };

    #[test]
    fn whole_prompt_with_letters() {
        insta::assert_snapshot!(built_in().user(&FIELDS).unwrap(), @r#"
        Instruction: The history lists movies that a user has chosen, the latest last. Which of the candidates is the user most likely to choose next? Answer with its letter only.
        Interaction History: Toy Story (1995); Heat (1995)
        Candidate Items:
        A. Fargo (1996)
        B. Babe (1995)
        Similar User Interaction History: Clerks (1994)
        Conventional Model Prediction: Babe (1995)
        Output:
        "#);
    }

    #[test]
    fn optional_fields_leave_no_trace_and_titles_have_no_letters() {
        let fields = Fields { style: CandidateStyle::Titles, history: &[], similar: &[], prediction: &[], ..FIELDS };
        insta::assert_snapshot!(built_in().user(&fields).unwrap(), @r#"
        Instruction: The history lists movies that a user has chosen, the latest last. Rank all candidates from the most to the least likely to be chosen next. Answer with their exact titles, one on each line.
        Interaction History: none
        Candidate Items:
        Fargo (1996)
        Babe (1995)
        Output:
        "#);
        assert!(!built_in().user(&fields).unwrap().ends_with('\n'));
    }

    #[test]
    fn titles_are_text_not_templates() {
        let fields = Fields { candidates: &["{{ noun }} & <b>", "{% raw %}"], ..FIELDS };
        let text = built_in().user(&fields).unwrap();
        assert!(text.contains("A. {{ noun }} & <b>\nB. {% raw %}\n"), "{text}");
    }

    #[test]
    fn bad_templates_are_refused_with_line_and_reason() {
        for (system, user, words) in [
            ("x", "a\n{% if %}", "user template fails in line 2"),
            ("x", "{{ histroy }} {{ candidates }}", "user template fails in line 1"),
            ("{{ history }}", TOPK_USER, "system template fails"),
            ("x", "{{ history | join(' ') }}", "does not show the first candidate"),
            ("x", "{% for c in candidates %}{{ c.title }}{% endfor %}", "does not show the first of the history"),
        ] {
            let error = Templates::new(system, user).unwrap_err();
            assert_eq!(error.fault.exit_code(), 78);
            assert!(error.message.contains(words), "{error}");
        }
    }

    #[test]
    fn labels_end_with_the_alphabet() {
        assert_eq!((label(0), label(25), label(26)), (Some('A'), Some('Z'), None));
    }
}
