#!/usr/bin/env python3
"""CPU seconds of one LightGCN training epoch: ours and RecBole's, in turns, in one run.

Same data (the train part of leave-one-out by time), batch size 2048, 64 dimensions, 3 layers, one thread
each; sampling of negatives included, validation not. Ours is the ignored test `ml100k_epoch_seconds`.

    python3 -m venv venv
    venv/bin/pip install torch==2.15.0
    venv/bin/pip install recbole==1.2.1 numpy==2.4.6 scipy==1.17.1 pandas==3.1.1 scikit-learn==1.9.1 \\
        thop==0.1.1.post2209072238 tabulate==0.10.0 texttable==1.7.2 tensorboard==2.21.0 ray==2.6.3
    venv/bin/python peers/bench_lightgcn.py --inter ml-100k.inter

Prints a JSON line per turn, then min, median and max of both and the ratio of the medians. CPU seconds still
mean something on a busy machine, but neighbours share its caches: `load` says how busy it was.
"""
import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ONE_THREAD = {name: "1" for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def recbole_epochs(inter, epochs):
    """CPU seconds of each epoch of RecBole's LightGCN."""
    import numpy as np
    import pandas as pd
    import scipy.sparse as sp
    import torch

    torch.set_num_threads(1)
    # RecBole 1.2.1 was written for older versions of its dependencies; give it back what it expects of them.
    for name in ("float_", "complex_", "unicode_"):
        if not hasattr(np, name):
            setattr(np, name, {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}[name])
    if not hasattr(sp.dok_matrix, "_update"):
        sp.dok_matrix._update = lambda matrix, entries: matrix._dict.update(entries)
    aggregate = pd.Series.agg
    pd.Series.agg = lambda s, f=None, *a, **k: s.map(len) if f is len else aggregate(s, f, *a, **k)

    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    folder = tempfile.mkdtemp(prefix="bench_lightgcn_")
    os.makedirs(os.path.join(folder, "log"))
    shutil.copy(inter, os.path.join(folder, "log", "log.inter"))
    os.chdir(folder)  # it writes its own logs beside
    settings = {
        "data_path": folder, "checkpoint_dir": folder, "use_gpu": False, "show_progress": False, "state": "ERROR",
        "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        "embedding_size": 64, "n_layers": 3, "reg_weight": 1e-4, "train_batch_size": 2048, "learning_rate": 5e-3,
        "epochs": epochs, "seed": 1, "reproducibility": True,
    }
    sys.argv = sys.argv[:1]  # RecBole reads the command line too
    config = Config(model="LightGCN", dataset="log", config_dict=settings)
    init_seed(config["seed"], True)
    dataset = create_dataset(config)
    train, _, _ = data_preparation(config, dataset)
    model = get_model("LightGCN")(config, train.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], "LightGCN")(config, model)
    seconds = []
    for epoch in range(epochs):
        begun = time.process_time()
        trainer._train_epoch(train, epoch, show_progress=False)
        seconds.append(time.process_time() - begun)
    shutil.rmtree(folder, ignore_errors=True)
    return seconds


def our_binary():
    """Builds the integration tests and gives the path of their binary."""
    command = ["cargo", "test", "--release", "--test", "it", "--no-run", "--message-format", "json"]
    out = subprocess.run(command, cwd=HOME, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = [m["executable"] for m in map(json.loads, out.splitlines())
             if m.get("executable") and m.get("target", {}).get("name") == "it"]
    return found[-1]


def our_epoch(binary, inter):
    """Median CPU seconds of an epoch of ours."""
    command = [binary, "--ignored", "--nocapture", "--exact", "recommenders_ml100k::ml100k_epoch_seconds"]
    env = {**os.environ, **ONE_THREAD, "TAILFUSE_ML100K": inter}
    pipe = subprocess.PIPE
    done = subprocess.run(command, cwd=HOME, env=env, check=True, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    return float(re.search(r"lightgcn: ([0-9.]+) CPU s", done.stdout).group(1))


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--inter", required=True, help="RecBole's ml-100k.inter")
    args.add_argument("--runs", type=int, default=3, help="turns of each (default 3)")
    args.add_argument("--epochs", type=int, default=6, help="RecBole epochs per turn; the first is not counted (default 6)")
    args.add_argument("--binary", help="our integration test binary; built when left out")
    args.add_argument("--recbole-only", action="store_true", help=argparse.SUPPRESS)
    a = args.parse_args()
    a.inter = os.path.abspath(a.inter)
    if a.recbole_only:
        print(json.dumps(recbole_epochs(a.inter, a.epochs)))
        return
    binary = a.binary or our_binary()
    figures = {"tailfuse": [], "recbole": []}
    for turn in range(a.runs):
        figures["tailfuse"].append(our_epoch(binary, a.inter))
        command = [sys.executable, "-W", "ignore", os.path.abspath(__file__), "--recbole-only"]
        command += ["--inter", a.inter, "--epochs", str(a.epochs)]
        out = subprocess.run(command, env={**os.environ, **ONE_THREAD}, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures["recbole"].append(statistics.median(json.loads(out.splitlines()[-1])[1:]))
        last = {name: round(values[-1], 3) for name, values in figures.items()}
        print(json.dumps({"turn": turn + 1, "epoch_cpu_s": last, "load": os.getloadavg()[0]}), flush=True)
    spread = {name: {"min": round(min(v), 3), "median": round(statistics.median(v), 3), "max": round(max(v), 3)}
              for name, v in figures.items()}
    ratio = statistics.median(figures["recbole"]) / statistics.median(figures["tailfuse"])
    print(json.dumps({"epoch_cpu_s": spread, "recbole_to_tailfuse": round(ratio, 2)}))


if __name__ == "__main__":
    main()
