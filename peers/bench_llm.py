#!/usr/bin/env python3
"""Our LLM engine beside llama.cpp and transformers: the same weights, the same prompts, in turns, in one run.

    cargo build --release
    python3 -m venv peers-venv
    peers-venv/bin/pip install xllamacpp==2026.10.11549 transformers==5.23.0 torch==2.15.0 accelerate gguf pyarrow
    peers-venv/bin/python peers/bench_llm.py --gguf MODEL.gguf --prompts PROMPTS --threads 2

What is timed is what one pass of the `label` mode asks of an engine: read every prompt once and give the distribution
of the next token at its end; nothing is generated. All engines stay loaded (models are read, and one prompt is run,
before the clock starts) and take turns for --rounds rounds, so that a slower moment of the machine meets all of them.
Per round and engine: wall seconds, and CPU seconds of its process; others_cpu_s is what the rest of the machine used
meanwhile (wall seconds count only where that is near 0). Medians and prompts per second at the end, as one JSON object.

--prompts  JSON `{"prompts": [{"text": ...}, ...]}` with complete chat texts, or a Parquet file with the columns
           `system` and `prompt` (the output of a `prompt` stage), which are put into the ChatML form.
--hf       the same weights as f32 in a Hugging Face folder, for transformers; without it transformers
           dequantises the GGUF itself. The token ids are ours for every engine (`tailfuse llm`, op `tokenize`).
--engines  which ones, in which order. `tailfuse` is driven through `tailfuse llm`, one request a prompt;
           `tailfuse-batch` through the program that --batch-command names.
--batch-command  a program that says {"ready": true}, then takes the prompts' ids as one JSON line {"ids": [[...], ...]}
           on stdin and answers one line {"best": [...]} to each such line; it may batch and share prefixes.
"""
import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

TICK = os.sysconf("SC_CLK_TCK")


def process_cpu(pid):
    """User and system seconds of a process, all threads (Linux)."""
    with open(f"/proc/{pid}/stat") as fh:
        fields = fh.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def machine_cpu():
    """Busy CPU seconds of the whole machine since boot."""
    with open("/proc/stat") as fh:
        v = [int(x) for x in fh.readline().split()[1:9]]
    return (sum(v) - v[3] - v[4]) / TICK


def peak_mib(pid):
    with open(f"/proc/{pid}/status") as fh:
        return next(int(line.split()[1]) // 1024 for line in fh if line.startswith("VmHWM"))


def read_texts(path):
    if path.endswith(".parquet"):
        import pyarrow.parquet as pq

        table = pq.read_table(path, columns=["system", "prompt"])
        pairs = zip(table.column("system").to_pylist(), table.column("prompt").to_pylist())
        return [
            f"<|im_start|>system\n{s}<|im_end|>\n<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n" for s, p in pairs
        ]
    with open(path, encoding="utf-8") as fh:
        return [p["text"] for p in json.load(fh)["prompts"]]


# ---- Workers: one process per peer. A line on stdin is a pass over all prompts; a line on stdout is its answer.


def serve(score):
    score(1)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"best": score(None)}), flush=True)


def worker_llamacpp(a, ids):
    import xllamacpp as xlc

    p = xlc.CommonParams()
    p.model.path = a.gguf
    p.n_parallel, p.n_ctx = 1, max(2048, 2 * max(map(len, ids)))
    p.n_batch, p.n_ubatch = 2048, 512
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = a.threads
    p.warmup, p.cache_ram_mib, p.verbosity = True, 0, -1
    server = xlc.Server(p)

    def ask(prompt):
        # The server keeps the common prefix of one prompt and the next (cache_prompt): its best case.
        r = server.handle_completions({
            "prompt": prompt, "n_predict": 1, "max_tokens": 1, "temperature": 0.0, "cache_prompt": True,
            "ignore_eos": True, "n_probs": 1, "stream": False,
        })
        if "timings" not in r:
            raise SystemExit(f"llama.cpp: {str(r)[:400]}")
        return r["choices"][0]["logprobs"]["content"][0]["id"]

    def score(n):
        ask([0, 1, 2, 3])  # another text in the slot, so that the first prompt is not cached from the pass before
        return [ask(x) for x in ids[:n]]

    serve(score)


def worker_transformers(a, ids):
    import torch
    import transformers

    torch.set_num_threads(a.threads)
    torch.set_grad_enabled(False)
    if a.hf:
        model = transformers.LlamaForCausalLM.from_pretrained(a.hf, dtype=torch.float32).eval()
    else:
        folder, file = os.path.split(os.path.abspath(a.gguf))
        model = transformers.LlamaForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    shared = common_prefix(ids)

    def forward(x, past=None):
        return model(torch.tensor([x]), past_key_values=past, use_cache=True, logits_to_keep=1)

    def score(n):
        if shared == 0:
            return [int(forward(x).logits[0, -1].argmax()) for x in ids[:n]]
        # The keys and values of the common prefix are computed once: its best case here.
        cache, out = forward(ids[0][:shared]).past_key_values, []
        for x in ids[:n]:
            out.append(int(forward(x[shared:], cache).logits[0, -1].argmax()))
            cache.crop(-(len(x) - shared))
        return out

    serve(score)


def common_prefix(ids):
    n = 0
    shortest = min(map(len, ids))
    while n < shortest - 1 and len({x[n] for x in ids}) == 1:
        n += 1
    return n


# ---- The driver.


class Engine:
    """A loaded engine: `run()` makes one pass over all prompts."""

    def __init__(self, name, command, env=None, request=None, answers=1, pick=None):
        self.name, self.request, self.answers, self.pick = name, request or ["go"], answers, pick
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
        )

    def line(self):
        text = self.process.stdout.readline()
        if not text:
            raise SystemExit(f"{self.name} ended with {self.process.wait()}")
        return json.loads(text)

    def send(self, lines):
        self.process.stdin.write("".join(line + "\n" for line in lines))
        self.process.stdin.flush()

    def run(self):
        busy, cpu, wall = machine_cpu(), process_cpu(self.process.pid), time.perf_counter()
        best = []
        # One request at a time: a full pipe on either side would block both.
        for request in self.request:
            self.send([request])
            best.append(self.line())
        wall = time.perf_counter() - wall
        cpu, busy = process_cpu(self.process.pid) - cpu, machine_cpu() - busy
        best = self.pick(best) if self.pick else best[0]["best"]
        return {"wall_s": round(wall, 3), "cpu_s": round(cpu, 3), "others_cpu_s": round(max(0.0, busy - cpu), 2)}, best


def tokenize(a, texts):
    """Token ids of complete chat texts, special tokens as such."""
    requests = [json.dumps({"op": "tokenize", "text": t, "special": True}) for t in texts]
    done = subprocess.run(
        [a.tailfuse, "llm", "--model", a.gguf, "--device", "cpu"],
        input="".join(r + "\n" for r in requests), stdout=subprocess.PIPE, text=True, check=True,
    )
    return [json.loads(line)["ids"] for line in done.stdout.splitlines()]


def start(name, a, ids, ids_file):
    me = [sys.executable, os.path.abspath(__file__)]
    passed = ["--gguf", a.gguf, "--prompts", ids_file, "--threads", str(a.threads)] + (["--hf", a.hf] if a.hf else [])
    threads = {"RAYON_NUM_THREADS": str(a.threads), "OMP_NUM_THREADS": str(a.threads)}
    if name == "tailfuse":
        requests = [json.dumps({"op": "logits", "ids": x, "top": 1}) for x in ids]

        def pick(answers):
            wrong = next((x for x in answers if "error" in x), None)
            if wrong:
                raise SystemExit(f"tailfuse: {wrong['error']}")
            return [x["top"][0][0] for x in answers]

        e = Engine(name, [a.tailfuse, "llm", "--model", a.gguf, "--device", "cpu"], threads, requests, pick=pick)
        e.send(requests[:1])
        e.line()
        return e
    if name == "tailfuse-batch":
        if not a.batch_command:
            raise SystemExit("tailfuse-batch needs --batch-command")
        e = Engine(name, shlex.split(a.batch_command), threads, [json.dumps({"ids": ids})])
    else:
        e = Engine(name, me + ["--worker", name] + passed, threads)
    e.line()
    return e


def cpu_name():
    with open("/proc/cpuinfo") as fh:
        return next((line.split(":", 1)[1].strip() for line in fh if line.startswith("model name")), "unknown")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--gguf", required=True)
    ap.add_argument("--hf")
    ap.add_argument("--prompts", required=True)
    ap.add_argument("--tailfuse", default="target/release/tailfuse")
    ap.add_argument("--batch-command")
    ap.add_argument("--engines", default="tailfuse,llamacpp,transformers")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--n", type=int, default=0, help="only the first N prompts; 0 = all")
    ap.add_argument("--worker", choices=["llamacpp", "transformers"], help=argparse.SUPPRESS)
    a = ap.parse_args()

    if a.worker:
        with open(a.prompts, encoding="utf-8") as fh:
            ids = json.load(fh)
        return {"llamacpp": worker_llamacpp, "transformers": worker_transformers}[a.worker](a, ids)

    texts = read_texts(a.prompts)
    texts = texts[: a.n] if a.n else texts
    ids = tokenize(a, texts)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as ids_file:
        json.dump(ids, ids_file)
        ids_file.flush()
        engines = [start(name, a, ids, ids_file.name) for name in a.engines.split(",")]
    runs, best = {e.name: [] for e in engines}, {}
    for r in range(a.rounds):
        for e in engines:
            time.sleep(1.0)  # threads that spin after their work come to rest
            figures, best[e.name] = e.run()
            runs[e.name].append(figures)
            print(f"round {r + 1} {e.name}: {figures}", file=sys.stderr, flush=True)
    tokens = sum(map(len, ids))
    out = {}
    for e in engines:
        med = {k: round(statistics.median(x[k] for x in runs[e.name]), 3) for k in ("wall_s", "cpu_s", "others_cpu_s")}
        out[e.name] = {
            **med,
            "prompts_per_s": round(len(ids) / med["wall_s"], 3),
            "prompts_per_cpu_s": round(len(ids) / max(med["cpu_s"], 1e-9), 3),
            "prompt_tokens_per_s": round(tokens / med["wall_s"], 1),
            "peak_rss_mib": peak_mib(e.process.pid),
            "runs": runs[e.name],
        }
        e.process.stdin.close()
        e.process.wait()
    last = engines[-1].name
    print(json.dumps({
        "cpu": cpu_name(),
        "threads": a.threads,
        "loadavg": os.getloadavg(),
        "prompts": len(ids),
        "prompt_tokens": tokens,
        "common_prefix_tokens": common_prefix(ids) if len(ids) > 1 else 0,
        "same_next_token_as_" + last: {n: sum(x == y for x, y in zip(b, best[last])) for n, b in best.items()},
        "engines": out,
    }))


if __name__ == "__main__":
    main()
