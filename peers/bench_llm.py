#!/usr/bin/env python3
"""Our LLM engine beside llama.cpp and transformers: the same weights, the same prompts, the same cores, in turns, in one run.

    cargo build --release && cargo bench --bench llm --no-run
    python3 -m venv peers-venv
    peers-venv/bin/pip install xllamacpp==2026.10.11549 transformers==5.23.0 torch==2.15.0 accelerate gguf pyarrow
    for t in Q4_0 Q8_0; do peers-venv/bin/python peers/gguf_quantize.py --gguf MODEL.gguf --type $t --out target/MODEL.$t.gguf; done
    peers-venv/bin/python peers/bench_llm.py --gguf MODEL.gguf --also target/MODEL.Q4_0.gguf --also target/MODEL.Q8_0.gguf \\
        --prompts rec=REC.json --prompts demo=artifacts/FINGERPRINT/prompts.parquet

What is timed is what one pass of the `label` mode asks of an engine: read every prompt once and give the distribution
of the next token at its end; nothing is generated. Every engine may keep what its prompts have in common: ours and
transformers the common beginning of all, llama.cpp that of one prompt and the next. All engines stay loaded (models are
read, and one prompt is run, before the clock starts) and take turns for --rounds rounds, so that a slower moment of the
machine meets all of them. Per round and engine: wall seconds, and CPU seconds of its process; others_cpu_s is what the
rest of the machine used meanwhile (wall seconds count only where that is near 0).

Out: one JSON object, and the tables in Markdown on stderr. `users` are prompts. Error: the largest difference of a
log-probability from transformers in f32 over the 100 likeliest tokens of each of the first --error-prompts prompts (as much
of a row as llama.cpp's server gives), and in parts of the standard deviation of these log-probabilities.

--prompts  NAME=FILE, once or more: JSON `{"prompts": [{"text": ...}, ...]}` with complete chat texts, or a Parquet file with
           the columns `system` and `prompt` (the output of a `prompt` stage), which are put into the ChatML form.
--hf       the same weights as f32 in a Hugging Face folder, for transformers; without it transformers
           dequantises the GGUF itself. The token ids are ours for every engine (`tailfuse llm`, op `tokenize`).
--engines  which ones, in which order: tailfuse (default precision), tailfuse-f32, tailfuse-int8, transformers, and
           llamacpp, which stands for one engine per file (--gguf and every --also).
--bench    the program of `cargo bench --bench llm --no-run`; found in target/release/deps without it.
"""
import argparse
import glob
import json
import os
import statistics
import subprocess
import sys
import time

TICK = os.sysconf("SC_CLK_TCK")
TOP = 100


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


def read_texts(path, n):
    if path.endswith(".parquet"):
        import pyarrow.parquet as pq

        table = pq.read_table(path, columns=["system", "prompt"]).slice(0, n)
        pairs = zip(table.column("system").to_pylist(), table.column("prompt").to_pylist())
        return [
            f"<|im_start|>system\n{s}<|im_end|>\n<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n" for s, p in pairs
        ]
    with open(path, encoding="utf-8") as fh:
        return [p["text"] for p in json.load(fh)["prompts"]][:n]


# ---- Workers: one process per peer, and ours (`benches/llm.rs --worker`). It says {"ready": true, "load_s": ..}, then answers each
# line: {"ids": [[..], ..]} with {"best": [..]}, and {"ids": .., "top": n} with {"top": [[[id, log-probability], ..], ..]}.


def serve(load_s, score, top):
    print(json.dumps({"ready": True, "load_s": load_s}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "top" in request:
            print(json.dumps({"top": [top(x, request["top"]) for x in request["ids"]]}), flush=True)
        else:
            print(json.dumps({"best": score(request["ids"])}), flush=True)


def worker_llamacpp(a):
    import xllamacpp as xlc

    started = time.perf_counter()
    p = xlc.CommonParams()
    p.model.path = a.gguf
    p.n_parallel, p.n_ctx = 1, a.context
    p.n_batch, p.n_ubatch = 2048, 512
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = a.threads
    p.warmup, p.cache_ram_mib, p.verbosity = False, 0, -1
    server = xlc.Server(p)
    load_s = time.perf_counter() - started

    def ask(prompt, n=1):
        # The server keeps the common prefix of one prompt and the next (cache_prompt): its best case.
        r = server.handle_completions({
            "prompt": prompt, "n_predict": 1, "max_tokens": 1, "temperature": 0.0, "cache_prompt": True,
            "ignore_eos": True, "n_probs": n, "stream": False,
        })
        if "timings" not in r:
            raise SystemExit(f"llama.cpp: {str(r)[:400]}")
        return r["choices"][0]["logprobs"]["content"][0]

    def score(ids):
        ask([0, 1, 2, 3])  # another text in the slot, so that the first prompt is not cached from the pass before
        return [ask(x)["id"] for x in ids]

    serve(load_s, score, lambda x, n: [[t["id"], t["logprob"]] for t in ask(x, n)["top_logprobs"]])


def worker_transformers(a):
    import torch
    import transformers

    torch.set_num_threads(a.threads)
    torch.set_grad_enabled(False)
    started = time.perf_counter()
    if a.hf:
        model = transformers.LlamaForCausalLM.from_pretrained(a.hf, dtype=torch.float32).eval()
    else:
        folder, file = os.path.split(os.path.abspath(a.gguf))
        model = transformers.LlamaForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    load_s = time.perf_counter() - started

    def forward(x, past=None):
        return model(torch.tensor([x]), past_key_values=past, use_cache=True, logits_to_keep=1)

    def score(ids):
        shared = common_prefix(ids)
        if shared == 0 or len(ids) == 1:
            return [int(forward(x).logits[0, -1].argmax()) for x in ids]
        # The keys and values of the common prefix are computed once: its best case here.
        cache, out = forward(ids[0][:shared]).past_key_values, []
        for x in ids:
            out.append(int(forward(x[shared:], cache).logits[0, -1].argmax()))
            cache.crop(-(len(x) - shared))
        return out

    def top(x, n):
        values, places = forward(x).logits[0, -1].double().log_softmax(-1).topk(n)
        return [[int(i), float(v)] for i, v in zip(places, values)]

    serve(load_s, score, top)


def common_prefix(ids):
    n = 0
    shortest = min(map(len, ids))
    while n < shortest - 1 and len({x[n] for x in ids}) == 1:
        n += 1
    return n


# ---- The driver.


class Engine:
    """A loaded engine: `run()` makes one pass over a list of prompts."""

    def __init__(self, name, command, cores):
        self.name = name
        threads = {"RAYON_NUM_THREADS": str(len(cores)), "OMP_NUM_THREADS": str(len(cores))}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        self.load_s = round(self.line()["load_s"], 3)
        self.loaded_mib = peak_mib(self.process.pid)

    def line(self):
        text = self.process.stdout.readline()
        if not text:
            raise SystemExit(f"{self.name} ended with {self.process.wait()}")
        return json.loads(text)

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.line()

    def run(self, ids):
        busy, cpu, wall = machine_cpu(), process_cpu(self.process.pid), time.perf_counter()
        best = self.ask({"ids": ids})["best"]
        wall = time.perf_counter() - wall
        cpu, busy = process_cpu(self.process.pid) - cpu, machine_cpu() - busy
        return {"wall_s": round(wall, 3), "cpu_s": round(cpu, 3), "others_cpu_s": round(max(0.0, busy - cpu), 2)}, best


def tokenize(a, texts):
    """Token ids of complete chat texts, special tokens as such."""
    requests = [json.dumps({"op": "tokenize", "text": t, "special": True}) for t in texts]
    done = subprocess.run(
        [a.tailfuse, "llm", "--model", a.gguf, "--device", "cpu"],
        input="".join(r + "\n" for r in requests), stdout=subprocess.PIPE, text=True, check=True,
    )
    return [json.loads(line)["ids"] for line in done.stdout.splitlines()]


def start(a, context):
    """All engines of --engines."""
    cores = set(sorted(os.sched_getaffinity(0))[: a.threads])
    me = [sys.executable, os.path.abspath(__file__), "--threads", str(a.threads), "--context", str(context)]
    bench = a.bench or max(
        (f for f in glob.glob("target/release/deps/llm-*") if "." not in os.path.basename(f)), key=os.path.getmtime
    )
    out = []
    for name in a.engines.split(","):
        if name.startswith("tailfuse"):
            precision = name.partition("-")[2] or "auto"
            out.append(Engine(name, [bench, "--model", a.gguf, "--worker", "--precision", precision], cores))
        elif name == "transformers":
            hf = ["--hf", a.hf] if a.hf else []
            out.append(Engine("transformers f32", [*me, "--worker", name, "--gguf", a.gguf, *hf], cores))
        elif name == "llamacpp":
            for file in [a.gguf, *a.also]:
                kind = os.path.basename(file).removesuffix(".gguf").replace("-", ".").split(".")[-1]
                out.append(Engine(f"llama.cpp {kind}", [*me, "--worker", name, "--gguf", file], cores))
        else:
            raise SystemExit(f"there is no engine {name!r}")
    return out


def differences(top, reference):
    """Largest difference over the reference's likeliest tokens, and in standard deviations of these."""
    worst = relative = 0.0
    for row, want in zip(top, reference):
        got = dict(row)
        deltas = [abs(got[i] - p) for i, p in want if i in got]
        worst = max(worst, max(deltas))
        relative = max(relative, max(deltas) / statistics.pstdev([p for _, p in want]))
    return {"max": round(worst, 5), "of_std": round(relative, 5)}


def spread(values, digits=3):
    return [round(f, digits) for f in (min(values), statistics.median(values), max(values))]


def cpu_name():
    with open("/proc/cpuinfo") as fh:
        lines = fh.read().splitlines()
    name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "unknown")
    flags = next((x.split(":", 1)[1].split() for x in lines if x.startswith("flags")), [])
    return f"{name}, {', '.join(f for f in ('avx2', 'avx_vnni', 'avx512f', 'avx512_vnni', 'avx512_bf16') if f in flags)}"


def markdown(name, work):
    rows = [
        f"{name}: {work['prompts']} prompts, {work['prompt_tokens']} tokens, {work['common_prefix_tokens']} common to all",
        "",
        "| engine | users per CPU s | users per s | tokens/s | error, nats | of a std | first token as f32's | load s | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for e, r in work["engines"].items():
        three = lambda v: f"{v[1]} ({v[0]} to {v[2]})"  # noqa: E731
        rows.append(
            f"| {e} | {three(r['users_per_cpu_s'])} | {three(r['users_per_s'])} | {r['prompt_tokens_per_s']} "
            f"| {r['error']['max']} | {r['error']['of_std']} | {r['same_first_token']} | {r['load_s']} | {r['peak_mib']} |"
        )
    return "\n".join(rows) + "\n"


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--gguf", required=True)
    ap.add_argument("--also", action="append", default=[], help="the same weights in another type, for llama.cpp")
    ap.add_argument("--hf")
    ap.add_argument("--prompts", action="append", default=[])
    ap.add_argument("--tailfuse", default="target/release/tailfuse")
    ap.add_argument("--bench")
    ap.add_argument("--engines", default="tailfuse,tailfuse-f32,llamacpp,transformers")
    ap.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--n", type=int, default=20, help="the first N prompts of each list")
    ap.add_argument("--error-prompts", type=int, default=20)
    ap.add_argument("--worker", choices=["llamacpp", "transformers"], help=argparse.SUPPRESS)
    ap.add_argument("--context", type=int, default=2048, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.worker:
        return {"llamacpp": worker_llamacpp, "transformers": worker_transformers}[a.worker](a)

    lists = {}
    for given in a.prompts:
        name, _, path = given.rpartition("=")
        lists[name or os.path.basename(path)] = tokenize(a, read_texts(path, a.n))
    engines = start(a, max(2048, 256 + max(len(x) for ids in lists.values() for x in ids)))
    for e in engines:
        e.run([next(iter(lists.values()))[0]])
    reference = next((e for e in engines if e.name.startswith("transformers")), engines[-1])
    result = {"cpu": cpu_name(), "threads": a.threads, "reference": reference.name, "workloads": {}}
    for name, ids in lists.items():
        runs, best = {e.name: [] for e in engines}, {}
        for r in range(a.rounds):
            for e in engines:
                time.sleep(1.0)  # threads that spin after their work come to rest
                figures, best[e.name] = e.run(ids)
                runs[e.name].append(figures)
                print(f"{name} round {r + 1} {e.name}: {figures}", file=sys.stderr, flush=True)
        some = ids[: a.error_prompts]
        want = reference.ask({"ids": some, "top": TOP})["top"]
        tokens, out = sum(map(len, ids)), {}
        for e in engines:
            # More than is compared: another engine's hundred likeliest need not be the reference's.
            top = e.ask({"ids": some, "top": 20 * TOP})["top"]
            wall, cpu = [x["wall_s"] for x in runs[e.name]], [max(x["cpu_s"], 1e-9) for x in runs[e.name]]
            out[e.name] = {
                "users_per_cpu_s": spread([len(ids) / c for c in cpu]),
                "users_per_s": spread([len(ids) / w for w in wall]),
                "prompt_tokens_per_s": round(tokens / statistics.median(wall), 1),
                "prompt_tokens_per_cpu_s": round(tokens / statistics.median(cpu), 1),
                "error": differences(top, want),
                "same_first_token": sum(x == y for x, y in zip(best[e.name], best[reference.name])),
                "load_s": e.load_s, "loaded_mib": e.loaded_mib, "peak_mib": peak_mib(e.process.pid), "runs": runs[e.name],
            }
        result["workloads"][name] = {
            "prompts": len(ids), "prompt_tokens": tokens, "common_prefix_tokens": common_prefix(ids) if len(ids) > 1 else 0,
            "loadavg": os.getloadavg(), "engines": out,
        }
        print(markdown(name, result["workloads"][name]), file=sys.stderr, flush=True)
    for e in engines:
        e.process.stdin.close()
        e.process.wait()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
