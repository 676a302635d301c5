#!/usr/bin/env python3
"""An epoch at 100 thousand, 1 million and 10 million synthetic interactions: time and memory per interaction.

    python3 peers/bench_scale.py [--sizes 100000 1000000 10000000] [--models mf lightgcn sasrec] [--threads 1]

Runs `cargo bench --bench recommenders -- scale` once for each model and size, in a process of its own. The log has 50
interactions for each user and four users for each item, both with a power law, and is made by seed in the process (10
million: 200,000 users, 50,000 items). `log MiB` is the peak before the fit, which making the log takes; the fit's own
memory is what the peak grows by. Needs nothing but Python.
"""
import argparse
import json
import os
import subprocess

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def hyper(model, interactions):
    """Batches grow with the log: a step of LightGCN costs a pass over the whole graph."""
    batch = 2048 if interactions <= 200_000 else 16_384 if interactions <= 2_000_000 else 65_536
    if model == "sasrec":
        return {"loss": "sampled-softmax", "negatives": 512, "max_len": 50, "batch_size": 128}
    own = {"loss": "bpr", "embedding_dim": 64, "batch_size": batch}
    return {**own, "layers": 3} if model == "lightgcn" else own


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--sizes", nargs="*", type=int, default=[100_000, 1_000_000, 10_000_000])
    args.add_argument("--models", nargs="*", default=["mf", "lightgcn", "sasrec"])
    args.add_argument("--threads", type=int, default=1)
    args.add_argument("--binary", help="the benchmark's binary; `cargo bench` when left out")
    a = args.parse_args()
    env = {**os.environ, "RAYON_NUM_THREADS": str(a.threads)}
    program = [a.binary] if a.binary else ["cargo", "bench", "--bench", "recommenders", "--"]
    rows = []
    for model in a.models:
        for size in a.sizes:
            settings = hyper(model, size)
            command = [*program, "scale", model, json.dumps(settings), "--interactions", str(size)]
            done = subprocess.run(command, cwd=HOME, env=env, check=True, stdout=subprocess.PIPE, text=True)
            line = json.loads(done.stdout.strip().splitlines()[-1])
            line["hyper"] = settings
            print(json.dumps(line), flush=True)
            rows.append(line)
    head = ["model", "interactions", "users", "items", "batch", "epoch, wall s", "epoch, CPU s", "CPU us / interaction",
            "log MiB", "fit, bytes / interaction", "peak MiB"]
    print("\n| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|")
    for r in rows:
        cells = [r["model"], f"{r['interactions']:,}", f"{r['users']:,}", f"{r['items']:,}", str(r["hyper"]["batch_size"]),
                 f"{r['epoch_wall_s']:.2f}", f"{r['epoch_cpu_s']:.2f}", f"{r['cpu_us_per_interaction']:.2f}",
                 f"{r['log_rss_mib']:.0f}", f"{r['fit_bytes_per_interaction']:.0f}", f"{r['peak_rss_mib']:.0f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
