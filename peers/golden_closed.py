#!/usr/bin/env python3
"""Golden files of the closed forms: scores of a small random log by numpy, straight from the formulas.

    python3 -m venv venv && venv/bin/pip install numpy==2.4.6
    venv/bin/python peers/golden_closed.py tests/golden/recommenders

Everything is dense and exact (solves, full singular value decomposition, f64); ours is blocked, iterative and f32.
A file is a list of cases: `hyper`, the log as `pairs` (user, item) in time order, and `scores` [users, items]. Those of
`ials` also give the item vectors at the start and after the rounds, and the users' vectors solved from them.
"""
import argparse
import json
import os

import numpy as np

USERS, ITEMS = 30, 20


def log(seed):
    """(user, item) pairs, each once, in the order of time; every user has something."""
    random = np.random.default_rng(seed)
    taste = random.random((USERS, 3)) @ random.random((3, ITEMS))
    pairs = []
    for user in range(USERS):
        count = int(random.integers(1, 12))
        chance = taste[user] ** 3 / (taste[user] ** 3).sum()
        pairs += [(user, int(item)) for item in random.choice(ITEMS, count, replace=False, p=chance)]
    return pairs


def matrix(pairs):
    x = np.zeros((USERS, ITEMS))
    for user, item in pairs:
        x[user, item] = 1
    return x


def popularity(x, pairs, hyper):
    return np.tile(x.sum(0), (USERS, 1))


def item_knn(x, pairs, hyper):
    n = np.sqrt(x.sum(0))
    both = x.T @ x
    similarity = np.divide(both, np.outer(n, n) + hyper["shrink"], out=np.zeros_like(both), where=both > 0)
    np.fill_diagonal(similarity, 0)
    for row in similarity:
        # stable: ties by item index
        row[np.argsort(-row, kind="stable")[hyper["k"]:]] = 0
    return x @ similarity.T


def gf_cf(x, pairs, hyper):
    users, items = (np.maximum(x.sum(axis), 1) ** -0.5 for axis in (1, 0))
    r = users[:, None] * x * items
    v = np.linalg.svd(r, full_matrices=False)[2][:hyper.get("rank", 64)].T
    low_pass = items[:, None] * (v @ v.T) / items
    return x @ (r.T @ r + hyper["alpha"] * low_pass)


def ease(x, pairs, hyper):
    inverse = np.linalg.inv(x.T @ x + hyper["l2"] * np.eye(ITEMS))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    recent = np.zeros_like(x)
    back = {}
    for user, item in reversed(pairs):
        age = back.get(user, 0)
        recent[user, item] = hyper["floor"] + (1 - hyper["floor"]) * hyper["decay"] ** age
        back[user] = age + 1
    return recent @ weights


def solve_side(x, other, hyper):
    """The vectors of the rows of x, given those of its columns."""
    out = []
    for row in x:
        confidence = np.where(row > 0, hyper["alpha"], 1.0)
        left = other.T @ (confidence[:, None] * other) + hyper["reg"] * np.eye(hyper["factors"])
        out.append(np.linalg.solve(left, other.T @ (confidence * row)))
    return np.array(out)


def ials(x, pairs, hyper):
    start = np.random.default_rng(5).normal(0, 0.3, (ITEMS, hyper["factors"])).astype(np.float32)
    items = start.astype(np.float64)
    for _ in range(hyper["iterations"]):
        items = solve_side(x.T, solve_side(x, items, hyper), hyper)
    users = solve_side(x, items, hyper)
    flat = {"start": start, "item_vectors": items, "user_vectors": users}
    return users @ items.T, {name: [float(v) for v in values.ravel()] for name, values in flat.items()}


CASES = {
    "popularity": (popularity, [{"count": "users"}]),
    "item_knn": (item_knn, [{"k": 5, "shrink": 0.0}, {"k": 100, "shrink": 2.5}]),
    "gf_cf": (gf_cf, [{"rank": 4, "alpha": 3.0}, {"rank": 64, "alpha": 0.3}, {"alpha": 0.0}]),
    "ease": (ease, [{"l2": 2.0, "decay": 1.0, "floor": 0.1}, {"l2": 20.0, "decay": 0.7, "floor": 0.1},
                    {"l2": 0.5, "decay": 0.0, "floor": 0.0}]),
    "ials": (ials, [{"factors": 6, "reg": 0.5, "alpha": 0.25, "iterations": 4},
                    {"factors": 5, "reg": 2.0, "alpha": 40.0, "iterations": 3},
                    {"factors": 4, "reg": 0.1, "alpha": 1.0, "iterations": 1}]),
}


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("folder", help="where the files are written")
    folder = args.parse_args().folder
    for name, (function, hypers) in CASES.items():
        cases = []
        for seed, hyper in enumerate(hypers):
            pairs = log(seed)
            scores = function(matrix(pairs), pairs, hyper)
            more = {}
            if isinstance(scores, tuple):
                scores, more = scores
            cases.append({"hyper": hyper, "users": USERS, "items": ITEMS, "pairs": pairs,
                          "scores": [[float(f"{v:.9g}") for v in row] for row in scores], **more})
        with open(os.path.join(folder, name + ".json"), "w") as file:
            file.write(json.dumps(cases) + "\n")


if __name__ == "__main__":
    main()
