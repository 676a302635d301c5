#!/usr/bin/env python3
"""Our recommenders beside RecBole, torch and implicit: the same data, batch size, dimension and cores, in turns, in one run.

    python3 -m venv venv
    venv/bin/pip install torch==2.15.0
    venv/bin/pip install recbole==1.2.1 numpy==2.4.6 scipy==1.17.1 pandas==3.1.1 scikit-learn==1.9.1 \\
        thop==0.1.1.post2209072238 tabulate==0.10.0 texttable==1.7.2 tensorboard==2.21.0 ray==2.6.3 implicit==0.7.3
    venv/bin/python peers/bench_recommenders.py --data FOLDER [--quick]

FOLDER holds ml-100k.inter, .user and .item as RecBole distributes them. What is measured, in CPU seconds (user and
system) of the process that does the work, never of another one:

* `epoch`: one training epoch of MF (BPR), LightGCN, SGL, DeepFM, xDeepFM; sampling of negatives included, validation,
  reading of files and building of graphs not. The first epoch of a process is left out where there are more.
* `target`: SASRec and BERT4Rec until NDCG@10 on validation (all items but the user's train items) reaches --ndcg, all
  validations included. Each side trains as it does by default: RecBole on one sample for each prefix of a history
  (of the latest 20 items; 50 takes four times as long), ours on every position of a window. With --quick an epoch each.
* `top-k`: 20 items for every user out of given vectors, 104 random items of each user left out: against torch (a
  product, the seen scores overwritten, torch.topk; users in blocks of the size that suited it best) and implicit's
  `recommend`; at the size of MovieLens 100K, and 4,096 users of a catalogue of 50,000.

Each pair runs --rounds times; who goes first changes from round to round. Prints a JSON line for each turn, then a
table with the minimum, median and maximum of the CPU seconds, of the ratios peer / ours of the rounds, and the peak
resident memory of both processes. `load` says how busy the machine was: close everything else.
"""
import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
THREAD_NAMES = ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
DIM, BATCH = 64, 2048
FIELD_DIM, HIDDEN, CIN = 16, [128, 128], [64, 64]

# name: (kind, our model, our hyper-parameters, RecBole's model, RecBole's settings)
MODELS = {
    "mf": ("epoch", "mf", {"loss": "bpr", "embedding_dim": DIM, "batch_size": BATCH}, "BPR", {"embedding_size": DIM}),
    "lightgcn": ("epoch", "lightgcn", {"loss": "bpr", "embedding_dim": DIM, "layers": 3, "batch_size": BATCH}, "LightGCN",
                 {"embedding_size": DIM, "n_layers": 3, "reg_weight": 1e-4}),
    "sgl": ("epoch", "sgl", {"loss": "bpr", "embedding_dim": DIM, "layers": 3, "drop_rate": 0.1, "augmentation": "edge-drop",
                             "batch_size": BATCH}, "SGL",
            {"embedding_size": DIM, "n_layers": 3, "drop_ratio": 0.1, "type": "ED", "reg_weight": 1e-4}),
    "deepfm": ("epoch", "deepfm", {"embedding_dim": FIELD_DIM, "dnn_hidden_units": HIDDEN, "batch_size": BATCH},
               "DeepFM", {"embedding_size": FIELD_DIM, "mlp_hidden_size": HIDDEN, "dropout_prob": 0.0}),
    "xdeepfm": ("epoch", "xdeepfm", {"embedding_dim": FIELD_DIM, "dnn_hidden_units": HIDDEN, "cin_layer_size": CIN,
                                     "batch_size": BATCH}, "xDeepFM",
                {"embedding_size": FIELD_DIM, "mlp_hidden_size": HIDDEN, "cin_layer_size": CIN, "dropout_prob": 0.0}),
    "sasrec": ("target", "sasrec", {"embedding_dim": DIM}, "SASRec",
               {"hidden_size": DIM, "MAX_ITEM_LIST_LENGTH": 20, "train_batch_size": 512}),
    "bert4rec": ("target", "bert4rec", {"embedding_dim": DIM}, "BERT4Rec",
                 {"hidden_size": DIM, "MAX_ITEM_LIST_LENGTH": 20, "train_batch_size": 512}),
}
RATING = ("DeepFM", "xDeepFM")
SEQUENTIAL = ("SASRec", "BERT4Rec")

# name: users, items, seen items of each, rounds inside a process, users in a block of torch's
TOP_K = {"ml-100k": (943, 1682, 104, 20, 512), "50k items": (4096, 50_000, 104, 3, 512)}


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_rss_mib():
    """Of this process alone; `ru_maxrss` also counts the process that started it."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024


# ---- RecBole, in a process of its own


def make_recbole_run_today():
    """RecBole 1.2.1 was written for older versions of its dependencies; give it back what it expects of them."""
    import functools

    import numpy as np
    import pandas as pd
    import scipy.sparse as sp
    import torch

    for name, kind in {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}.items():
        if not hasattr(np, name):
            setattr(np, name, kind)
    if not hasattr(sp.dok_matrix, "_update"):
        sp.dok_matrix._update = lambda matrix, entries: matrix._dict.update(entries)
    aggregate = pd.Series.agg
    pd.Series.agg = lambda s, f=None, *a, **k: s.map(len) if f is len else aggregate(s, f, *a, **k)
    torch.load = functools.partial(torch.load, weights_only=False)


def recbole(a, name):
    """Measures RecBole's side of one comparison; prints JSON."""
    import torch

    torch.set_num_threads(a.threads)
    make_recbole_run_today()
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    _, _, _, model_name, own = MODELS[name]
    rating, sequential = model_name in RATING, model_name in SEQUENTIAL
    folder = tempfile.mkdtemp(prefix="bench_recommenders_")
    os.makedirs(os.path.join(folder, "log"))
    for kind in ("user", "item"):
        shutil.copy(os.path.join(a.data, "ml-100k." + kind), os.path.join(folder, "log", "log." + kind))
    histories = write_log(os.path.join(a.data, "ml-100k.inter"), os.path.join(folder, "log", "log.inter"))
    os.chdir(folder)  # it writes its own logs beside
    columns = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    if rating:
        columns.update(user=["user_id", "age", "gender", "occupation"], item=["item_id", "release_year", "class"])
    settings = {
        "data_path": folder, "checkpoint_dir": folder, "use_gpu": False, "device": "cpu", "show_progress": False,
        "state": "ERROR", "worker": 0, "seed": a.seed, "reproducibility": True, "load_col": columns,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user",
                      "mode": "labeled" if rating else "full"},
        "train_batch_size": BATCH, "eval_batch_size": 4096, "learning_rate": 1e-3, "epochs": 1000,
        "metrics": ["RMSE"] if rating else ["NDCG"], "valid_metric": "RMSE" if rating else "NDCG@10", "topk": [10],
        "metric_decimal_place": 4,
    }
    if rating:
        settings.update(LABEL_FIELD="rating", train_neg_sample_args=None, numerical_features=[])
    if sequential:
        settings.update(loss_type="CE", train_neg_sample_args=None)
    settings.update(own)
    sys.argv = sys.argv[:1]  # RecBole reads the command line too
    model_class = get_model(model_name)
    if rating:  # squared error of the rating itself, as ours
        forward = lambda model, rows: model.forward(rows).view(-1)
        model_class.predict = forward
        model_class.calculate_loss = lambda model, rows: torch.nn.functional.mse_loss(
            forward(model, rows), rows["rating"].float())
    config = Config(model=model_name, dataset="log", config_dict=settings)
    init_seed(config["seed"], True)
    dataset = create_dataset(config)
    train, valid, _ = data_preparation(config, dataset)
    model = model_class(config, train.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], model_name)(config, model)
    if sequential:
        mask_seen_items(trainer, dataset, histories)
    seconds, reached, measured = [], False, None
    wants_target = a.what == "target"
    for epoch in range(a.max_epochs if wants_target else a.epochs):
        begun = cpu_seconds()
        trainer._train_epoch(train, epoch, show_progress=False)
        if wants_target:
            measured = float(trainer.evaluate(valid, load_best_model=False, show_progress=False)["ndcg@10"])
        seconds.append(cpu_seconds() - begun)
        if wants_target:
            print(json.dumps({"epoch": epoch + 1, "valid": measured, "total_cpu_s": sum(seconds)}), flush=True)
            if measured >= a.ndcg:
                reached = True
                break
    shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"epoch_cpu_s": seconds, "cpu_s": sum(seconds), "reached": reached, "valid": measured,
                      "peak_rss_mib": peak_rss_mib()}))


def write_log(source, target):
    """The log with the place in the user's history (by time, ties in file order, as ours) instead of the time, so that
    both sides hold out the same rows. Gives the items of each user, oldest first."""
    with open(source) as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    histories = {}
    with open(target, "w") as file:
        file.write("\t".join(rows[0]) + "\n")
        for row in sorted(rows[1:], key=lambda row: float(row[3])):
            history = histories.setdefault(row[0], [])
            file.write("\t".join([*row[:3], str(len(history))]) + "\n")
            history.append(row[1])
    return histories


def mask_seen_items(trainer, dataset, histories):
    """RecBole ranks a sequential model's known items too, which halves its figures; the target itself stays."""
    import numpy as np
    import scipy.sparse as sp
    import torch

    pairs = np.array([(user, item) for user, items in histories.items() for item in items[:-2]])
    users, items = (dataset.token2id(name, pairs[:, n]) for n, name in enumerate(("user_id", "item_id")))
    seen = sp.csr_matrix((np.ones(len(users), bool), (users, items)), shape=(dataset.user_num, dataset.item_num))
    base = trainer._full_sort_batch_eval

    def masked(batch):
        interaction, scores, at_user, at_item = base(batch)
        known = seen[interaction["user_id"].cpu().numpy()].tocoo()
        kept = scores[at_user, at_item].clone()
        scores[torch.from_numpy(known.row).long(), torch.from_numpy(known.col).long()] = -np.inf
        scores[at_user, at_item] = kept
        return interaction, scores, at_user, at_item

    trainer._full_sort_batch_eval = masked


# ---- top-k peers, each in a process of its own


def vectors(users, items, seen, seed):
    import numpy as np

    random = np.random.default_rng(seed)
    draw = lambda n: random.standard_normal((n, DIM), dtype=np.float32)
    return draw(users), draw(items), (random.random((users, seen)) ** 3 * items).astype(np.int64)


def top_k_torch(a, name):
    import torch

    torch.set_num_threads(a.threads)
    users, items, seen, rounds, block = TOP_K[name]
    of_users, of_items, known = map(torch.from_numpy, vectors(users, items, seen, a.seed))
    runs = []
    for _ in range(rounds):
        begun = cpu_seconds()
        for first in range(0, users, block):
            scores = of_users[first:first + block] @ of_items.T
            scores.scatter_(1, known[first:first + block], float("-inf"))
            torch.topk(scores, 20)
        runs.append(cpu_seconds() - begun)
    print(json.dumps({"cpu_s": runs, "peak_rss_mib": peak_rss_mib()}))


def top_k_implicit(a, name):
    import numpy as np
    import scipy.sparse as sp
    from implicit.cpu.als import AlternatingLeastSquares

    users, items, seen, rounds, block = TOP_K[name]
    model = AlternatingLeastSquares(factors=DIM, num_threads=a.threads)
    model.user_factors, model.item_factors, known = vectors(users, items, seen, a.seed)
    entries = (np.ones(known.size, np.float32), (np.repeat(np.arange(users), seen), known.ravel()))
    log = sp.csr_matrix(entries, shape=(users, items))
    runs = []
    for _ in range(rounds):
        begun = cpu_seconds()
        for first in range(0, users, block):
            some = np.arange(first, min(first + block, users))
            model.recommend(some, log[some], N=20, filter_already_liked_items=True)
        runs.append(cpu_seconds() - begun)
    print(json.dumps({"cpu_s": runs, "peak_rss_mib": peak_rss_mib()}))


# ---- turns


def our_binary():
    """Builds benches/recommenders.rs and gives the path of its binary."""
    command = ["cargo", "bench", "--bench", "recommenders", "--no-run", "--message-format", "json"]
    out = subprocess.run(command, cwd=HOME, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = [m["executable"] for m in map(json.loads, out.splitlines())
             if m.get("executable") and m.get("target", {}).get("name") == "recommenders"]
    return found[-1]


def last_line(command, threads):
    env = {**os.environ, **{name: str(threads) for name in THREAD_NAMES}}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"failed with exit code {done.returncode}: {' '.join(command)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def typical(seconds):
    """The median, without the first one where there are more."""
    return statistics.median(seconds[1:] or seconds)


def sides(a, binary, name, what):
    """(peer's name, our turn, the peer's turn): functions that give CPU seconds, memory and more."""
    script = [sys.executable, "-W", "ignore", os.path.abspath(__file__), "--data", a.data, "--seed", str(a.seed),
              "--threads", str(a.threads), "--epochs", str(a.epochs), "--max-epochs", str(a.max_epochs),
              "--ndcg", str(a.ndcg)]
    if what == "top-k":
        name, peer = name
        users, items, seen, rounds, _ = TOP_K[name]
        ours = [binary, "top-k", "--users", str(users), "--items", str(items), "--dim", str(DIM), "--seen", str(seen),
                "--rounds", str(rounds), "--seed", str(a.seed)]
        python = a.implicit_python if peer == "implicit" else sys.executable
        theirs = [python, *script[1:], "--side", f"{peer}:{name}"]
        read = lambda out: {"cpu_s": typical(out["cpu_s"]), "peak_rss_mib": out["peak_rss_mib"]}
    else:
        _, model, hyper, _, _ = MODELS[name]
        peer = "RecBole"
        theirs = [*script, "--side", f"recbole:{name}", "--what", what]
        ours = [binary, "target" if what == "target" else "epochs", model, json.dumps(hyper), "--data", a.data,
                "--seed", str(a.seed)]
        if what == "target":
            ours += ["--ndcg", str(a.ndcg), "--epochs", str(a.max_epochs)]
            read = lambda out: {"cpu_s": out["cpu_s"], "peak_rss_mib": out["peak_rss_mib"], "reached": out["reached"]}
        else:
            ours += ["--epochs", str(a.epochs)]
            read = lambda out: {"cpu_s": typical(out["epoch_cpu_s"]), "peak_rss_mib": out["peak_rss_mib"]}
    return peer, lambda: read(last_line(ours, a.threads)), lambda: read(last_line(theirs, a.threads))


def compare(a, binary, label, name, what):
    peer, ours, theirs = sides(a, binary, name, what)
    turns = []
    for turn in range(a.rounds):
        first, second = (ours, theirs) if turn % 2 == 0 else (theirs, ours)
        one, two = first(), second()
        mine, other = (one, two) if turn % 2 == 0 else (two, one)
        turns.append((mine, other))
        print(json.dumps({"what": f"{what} {label}", "peer": peer, "round": turn + 1, "ours": mine, "theirs": other,
                          "ratio": round(other["cpu_s"] / mine["cpu_s"], 2), "load": os.getloadavg()[0],
                          "time": time.strftime("%H:%M:%S")}), flush=True)
    spread = lambda values, digits: " / ".join(f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
    missed = [side for side, n in (("ours", 0), (peer, 1)) if not all(t[n].get("reached", True) for t in turns)]
    return [f"{what} {label}", peer, spread([t[0]["cpu_s"] for t in turns], 4),
            spread([t[1]["cpu_s"] for t in turns], 4),
            spread([t[1]["cpu_s"] / t[0]["cpu_s"] for t in turns], 2) + (f" (not reached: {', '.join(missed)})" if missed else ""),
            f"{max(t[0]['peak_rss_mib'] for t in turns):.0f}", f"{max(t[1]['peak_rss_mib'] for t in turns):.0f}"]


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--data", required=True, help="folder with ml-100k.inter, .user and .item")
    args.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), help="default: all")
    args.add_argument("--no-top-k", action="store_true", help="leave the shortlists out")
    args.add_argument("--quick", action="store_true", help="one epoch of the sequential models instead of --ndcg")
    args.add_argument("--rounds", type=int, default=3, help="turns of each side (default 3)")
    args.add_argument("--epochs", type=int, default=4, help="epochs in a turn; the first is not counted (default 4)")
    args.add_argument("--ndcg", type=float, default=0.113, help="NDCG@10 on validation to reach (default 0.113)")
    args.add_argument("--max-epochs", type=int, default=200, help="where a side gives up (default 200)")
    args.add_argument("--threads", type=int, default=1, help="threads of each side (default 1)")
    args.add_argument("--seed", type=int, default=1)
    args.add_argument("--binary", help="our benchmark's binary; built when left out")
    args.add_argument("--implicit-python", default=sys.executable, help="another Python that has implicit")
    args.add_argument("--side", help=argparse.SUPPRESS)
    args.add_argument("--what", default="epoch", help=argparse.SUPPRESS)
    a = args.parse_args()
    a.data = os.path.abspath(a.data)
    if a.side:
        side, name = a.side.split(":", 1)
        return {"recbole": recbole, "torch": top_k_torch, "implicit": top_k_implicit}[side](a, name)
    binary = a.binary or our_binary()
    table = []
    if not a.no_top_k:
        for name in TOP_K:
            for peer in ("torch", "implicit"):
                table.append(compare(a, binary, name, (name, peer), "top-k"))
    for name in a.models:
        what = MODELS[name][0]
        if what == "target" and a.quick:
            what, a.epochs = "epoch", 1
        table.append(compare(a, binary, name, name, what))
    head = ["what", "peer", "ours, CPU s (min / median / max)", "peer, CPU s", "peer / ours", "ours, peak MiB", "peer, peak MiB"]
    print("\n| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|")
    for row in table:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
