# `just` lists the recipes; every recipe is a command that also works by hand.

export CARGO_TERM_PROGRESS_WHEN := env("CARGO_TERM_PROGRESS_WHEN", "auto")

# Lists the recipes.
default:
    @just --list

# The whole path on MovieLens 100K: fetches what it needs, ends with tables on the terminal.
demo *ARGS:
    cargo run --release -- run pipelines/demo.toml {{ ARGS }}

# Fixtures that some tests use; after this, tests need no network.
fetch:
    cargo run --release -- fetch ml-100k smollm2-135m-instruct

# All tests. They work offline once the fixtures are there.
test *ARGS:
    cargo test --release {{ ARGS }}

# Formatting, and clippy with warnings denied (this compiles the CUDA back end too).
lint:
    cargo fmt --check
    cargo clippy --release --all-targets --features cuda -- -D warnings

# Formats the code.
fmt:
    cargo fmt

# The benchmarks in benches/.
bench *ARGS:
    cargo bench {{ ARGS }}

# Damaged model files, tokenizers, templates and answers of servers, N of each kind (docs/reliability.md).
fuzz N="1000000":
    TAILFUSE_FUZZ={{ N }} cargo test --release --lib -- --nocapture llm::hostile fuzz_remote_answers

# N kills (SIGKILL at named points and at random times), night after night: each must end as one that was left alone (docs/reliability.md).
torture N="100" SEED="1":
    TAILFUSE_TORTURE={{ N }} TAILFUSE_TORTURE_SEED={{ SEED }} cargo test --release --test it -- --ignored --nocapture kills::many_kills

# Our LLM engine beside llama.cpp (the file as it is, Q4_0 and Q8_0 of the same weights) and transformers; the head of the script says what to install first.
bench-llm PYTHON GGUF *ARGS:
    cargo build --release
    cargo bench --bench llm --no-run
    for t in Q4_0 Q8_0; do {{ PYTHON }} peers/gguf_quantize.py --gguf {{ GGUF }} --type $t --out target/bench-llm.$t.gguf; done
    {{ PYTHON }} peers/bench_llm.py --gguf {{ GGUF }} --also target/bench-llm.Q4_0.gguf --also target/bench-llm.Q8_0.gguf {{ ARGS }}

# The tables of docs/experiments.md: every model on MovieLens 100K, five seeds. What was fitted before is not fitted again.
experiments:
    cargo build --release
    for task in baselines direct sequential rating; do target/release/tailfuse run pipelines/experiments/$task.toml; done

# Our recommenders beside RecBole, torch and implicit, in turns; the head of the script says what to install first.
bench-peers PYTHON DATA *ARGS:
    cargo build --release --bench recommenders
    {{ PYTHON }} peers/bench_recommenders.py --data {{ DATA }} {{ ARGS }}

# Makes the generated references again: docs/pipeline.md and docs/tables.md.
docs:
    cargo run --release -- schema --markdown > target/pipeline.md
    cargo run --release -- schema --tables > target/tables.md
    mv target/pipeline.md docs/pipeline.md
    mv target/tables.md docs/tables.md

# Remote engines against llama.cpp's own server, with a Python that has xllamacpp (`pip install xllamacpp`).
test-remote PYTHON *ARGS:
    TAILFUSE_PYTHON={{ PYTHON }} cargo test --release --test it -- remote:: rerank:: {{ ARGS }}

# Delta tables and S3, read back by a Python that has deltalake and duckdb (`pip install deltalake duckdb`).
test-storage PYTHON *ARGS:
    TAILFUSE_TEST_PYTHON={{ PYTHON }} cargo test --release --test it -- delta:: s3:: export_reader:: {{ ARGS }}

# Forgets what stages computed here. Downloads, answers of the LLM (artifacts/ledger*) and published tables stay.
clean-cache:
    if [ -d artifacts ]; then find artifacts -mindepth 1 -maxdepth 1 ! -name 'ledger*' -exec rm -rf {} +; fi

# What a change must pass.
ci:
    .ci/run

# Licences, sources and bans of all dependencies against deny.toml: by cargo-deny, or a script of ours where it is not installed.
deny:
    if cargo deny --version >/dev/null 2>&1; then cargo deny --offline check bans licenses sources; else python3 peers/check_licences.py; fi

# The operator in a real Airflow (docs/airflow-test.md): an environment of its own in target/airflow, then the cases of tests/airflow.
test-airflow *ARGS:
    cargo build --release
    test -x target/airflow/bin/airflow || (python3 -m venv target/airflow && target/airflow/bin/pip install -r tests/airflow/requirements.txt)
    target/airflow/bin/python tests/airflow/run.py --airflow target/airflow/bin --tailfuse target/release/tailfuse --log docs/airflow-test.md {{ ARGS }}

# Lineage events against openlineage-python's classes, with a Python that has it (`pip install openlineage-python==1.54.0`).
test-lineage PYTHON:
    TAILFUSE_OPENLINEAGE_PYTHON={{ PYTHON }} cargo test --release --test it -- surroundings::failures_are_told_too

# The `[[test]]` blocks of the pipelines that ship.
test-pipelines:
    for p in $(grep -l '^\[\[test\]\]' pipelines/*.toml); do cargo run --release -- test $p; done
