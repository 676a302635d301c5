//! tailfuse: batch recommendation pipelines in which a conventional recommender and an LLM
//! improve each other and are fused per user (the method of Llama4Rec, arXiv 2401.13870).
//!
//! One way through the house: `cli -> pipeline -> stages -> { tables, query, interactions,
//! recommenders, llm, prompts, fusion, eval, catalog }`. An arrow never points back.

pub mod catalog;
pub mod cli;
pub mod columns;
pub mod device;
pub mod error;
pub mod eval;
pub mod fault;
pub mod fusion;
pub mod interactions;
pub mod llm;
pub mod pipeline;
pub mod prompts;
pub mod query;
pub mod recommenders;
pub mod stages;
pub mod tables;
