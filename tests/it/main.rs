//! All integration tests, one binary.
#![allow(clippy::unwrap_used, clippy::print_stderr, missing_docs)]

// The direction of imports, complete registries.
mod architecture;
// Generated documents are current: docs/pipeline.md, the JSON Schema.
mod docs;
// The generated reference of tables against the code.
mod docs_tables;
// `init` on files of many sorts, and `[[test]]` blocks.
mod init;
// Lineage, JSON logs, secrets, the sandbox.
mod surroundings;
// The whole path through the binary, on a small world.
mod end_to_end;
// The published files, read and scored by another program.
mod export_reader;
// A small world: log, item table, tiny LLM, pipeline file.
#[macro_use]
mod fixtures;

// The pipeline file's language: parsing, parameters, validation, the graph.
mod pipeline_file;
// Stage kinds without work behind them, for the above.
mod pipeline_file_fakes;

// The catalogue against a local HTTP server and a stand-in for pip: good and bad sources, locks, files placed by hand.
mod catalog;
// Damaged Parquet files are named, and never cause a panic.
mod corrupt_tables;
// Sources: types, partitions, bad rows, repeats.
mod sources;
// What the tests of tables share.
mod table_support;
// Delta tables: commits, races, columns, versions, the lease of a run.
mod delta;
// Sources and published tables on a real S3 server.
mod s3;
// That server.
mod s3_server;

// SQL: functions, shipped files, the names of tables, errors, output, and the stages on it.
mod query_sql;
// `top_similar` as SQL and as a stage.
mod similar;

// The leave-one-out split of MovieLens-100K has the reference's contents.
mod split_ml100k;
// One contract for every recommender of the registry.
mod recommenders;
// Training, search, prediction and evaluation as stages: resumed runs, bad input, every backbone.
mod training;
// Training on a GPU against training on the CPU, where there is a GPU.
mod gpu;
// Figures of the recommenders on MovieLens-100K (run by hand).
mod recommenders_ml100k;

// The LLM engine against golden values.
mod llm;
// Damaged, cut-off and foreign model files.
mod llm_files;
// The JSON-lines protocol of `tailfuse llm`.
mod llm_serve;
// Remote engines: faults, deadlines, llama.cpp's own server.
mod remote;
// Servers for these tests.
mod remote_server;
// Each exit code, by the binary.
mod exit_codes;
// Stores and disks that fail.
mod faulty_places;
// Kills at any point, SIGTERM, what is left behind, and runs that are parts of one or have nothing to do.
mod kills;
// `rerank` through the binary: a server, the ledger, reuse, kills.
mod rerank;
// Ratings that the LLM gives, one prompt each.
mod llm_ratings;
// Prompts counted by a real tokenizer: budget, common beginning, hostile titles.
mod prompts;
// The tuning set: nothing held out in it.
mod instruct;
// `finetune`: the loss falls, tuned models are asked, transformers and peft load them.
mod finetune;
// The item model: trained, recommended from, fused.
mod item_mode;

// Metrics of hand-made tables, the choice of weights, the terminal's tables.
mod evaluation;
// The fused table: every column, source and reason.
mod fusion;
// `calibrate`, `fuse` and `evaluate` over Parquet files; the long-tail query against the code.
mod fusion_stages;
// Calibration, nightly pipeline, audits, new users, warm start.
mod nightly;
