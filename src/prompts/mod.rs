//! What the LLM is shown: templates, titles, token budgets.
//!
//! In: a user's history and shortlist as titles, what the recommender adds (a similar user's
//! history, its own prediction; arXiv 2401.13870, section 4.3). Out: messages that fit the model's
//! context, with the same beginning for all users, so that its KV cache is computed once.
//! The templates are the files of `prompts/`, built in and replaceable.

pub mod budget;
pub mod defaults;
pub mod instructions;
pub mod templates;
pub mod titles;
pub mod topk;

pub use budget::{Budget, Fitted, TooLong, fit};
pub use instructions::{InstructionFields, InstructionTask, InstructionTemplates, Line};
pub use templates::{CandidateStyle, Fields, LETTERS, Templates, label};
pub use titles::{clean_title, rating_text};
pub use topk::{CandidateOrder, TopkOptions, TopkPrompt, UserCase};
