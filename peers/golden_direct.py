#!/usr/bin/env python3
"""Golden values of the direct backbones (mf, lightgcn, mixgcf, sgl): losses, gradients and embeddings of a tiny case.

An implementation of its own in PyTorch, in double precision and on dense matrices, after the papers: BPR
(arXiv 1205.2618), LightGCN (arXiv 2002.02126), MixGCF (Huang et al., KDD 2021), SGL (arXiv 2010.10783). Writes
tests/golden/recommenders/{mf,lightgcn,mixgcf,sgl}.json, which the unit tests of those modules read.

    python3 -m venv venv && venv/bin/pip install torch==2.15.0
    venv/bin/python peers/golden_direct.py
"""
import json
import math
import os

import torch

torch.set_default_dtype(torch.float64)
FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests", "golden", "recommenders")

USERS, ITEMS, DIM = 4, 6, 3
# User 0 has item 1 twice in the log; user 3 has one item; item 5 is never seen.
TRAIN = [(0, 0), (0, 1), (0, 1), (0, 3), (1, 1), (1, 2), (2, 3), (2, 0), (2, 4), (3, 4)]
# What is known later, at test time.
LATER = TRAIN + [(0, 4), (1, 0), (3, 5)]
# A batch with a repeated user, a repeated item and one repeated pair.
PAIRS = [(0, 0), (0, 1), (1, 2), (2, 3), (3, 4), (1, 2), (2, 4)]


def table(rows, phase):
    return torch.tensor([[math.sin(0.9 * (r * DIM + d) + phase) for d in range(DIM)] for r in range(rows)])


def adjacency(edges):
    """D^-1/2 A D^-1/2 of the bipartite graph."""
    a = torch.zeros(USERS + ITEMS, USERS + ITEMS)
    for u, i in set(edges):
        a[u, USERS + i] = a[USERS + i, u] = 1.0
    degree = a.sum(1)
    scale = torch.where(degree > 0, degree.clamp(min=1).pow(-0.5), torch.zeros_like(degree))
    return scale[:, None] * a * scale[None, :]


def unit(x):
    return x / (x.pow(2).sum(-1, keepdim=True) + 1e-12).sqrt()


def ranking_loss(users, items, case):
    """Mean over the pairs; `users`, `items` are final embeddings."""
    if case.get("cosine"):
        users, items = unit(users), unit(items)
    scores = users @ items.T / case.get("temperature", 1.0)
    total = torch.zeros(())
    for n, (u, i) in enumerate(PAIRS):
        if case["loss"] == "bpr":
            k = case.get("negatives", 1)
            for j in case["draw"][n * k:(n + 1) * k]:
                total = total - torch.nn.functional.logsigmoid(scores[u, i] - scores[u, j]) / k
        elif case["loss"] == "softmax":
            total = total - torch.log_softmax(scores[u], 0)[i]
        else:
            classes = sorted({i for _, i in PAIRS} | set(case["draw"]))
            distinct = set(TRAIN)
            missed = [
                (1 - sum(1 for p in distinct if p[1] == c) / len(distinct)) ** len(PAIRS)
                * (1 - 1 / ITEMS) ** len(case["draw"])
                for c in classes
            ]
            corrected = scores[u, classes] - torch.tensor([math.log(1 - m) for m in missed])
            total = total - torch.log_softmax(corrected, 0)[classes.index(i)]
    return total / len(PAIRS)


def l2_term(users, items, case):
    total = torch.zeros(())
    for n, (u, i) in enumerate(PAIRS):
        total = total + users[u].pow(2).sum() + items[i].pow(2).sum()
        if case["loss"] == "bpr":
            k = case.get("negatives", 1)
            for j in case["draw"][n * k:(n + 1) * k]:
                total = total + items[j].pow(2).sum()
    return case["l2"] / 2 * total / len(PAIRS)


LOSSES = [
    {"loss": "bpr", "l2": 0.1, "draw": [2, 5, 3, 1, 0, 5, 2]},
    {"loss": "bpr", "negatives": 2, "l2": 0.0, "draw": [2, 5, 4, 2, 3, 0, 1, 5, 0, 1, 5, 5, 2, 1]},
    {"loss": "bpr", "cosine": True, "temperature": 0.3, "l2": 0.05, "draw": [2, 5, 3, 1, 0, 5, 2]},
    {"loss": "softmax", "l2": 0.1, "draw": []},
    {"loss": "softmax", "cosine": True, "temperature": 0.2, "l2": 0.0, "draw": []},
    {"loss": "sampled-softmax", "negatives": 3, "temperature": 0.7, "l2": 0.02, "draw": [5, 1, 5]},
    {"loss": "sampled-softmax", "negatives": 2, "cosine": True, "temperature": 0.5, "l2": 0.0, "draw": [2, 0]},
]


def flat(x):
    return [float(f"{v:.9g}") for v in x.detach().reshape(-1).tolist()]


def hyper(case, **more):
    given = {k: case[k] for k in ("loss", "negatives", "cosine", "temperature", "l2") if k in case}
    return {"embedding_dim": DIM, **given, **more}


def solved(hyper, loss, weights, **more):
    """A case with its loss and the gradient at each weight."""
    for w in weights.values():
        w.grad = None
    loss.backward()
    gradients = {name: flat(w.grad if w.grad is not None else torch.zeros_like(w)) for name, w in weights.items()}
    return {"hyper": hyper, "loss": float(f"{loss.item():.9g}"), "gradients": gradients, **more}


def mf():
    users, items = table(USERS, 0.3).requires_grad_(), table(ITEMS, 1.1).requires_grad_()
    weights = {"user_embeddings": users, "item_embeddings": items}
    cases = []
    for case in LOSSES:
        loss = ranking_loss(users, items, case) + l2_term(users, items, case)
        cases.append(solved(hyper(case), loss, weights, draw=case["draw"]))
    return weights, cases


def hops(ego, matrices):
    all_hops = [ego]
    for matrix in matrices:
        all_hops.append(matrix @ all_hops[-1])
    return all_hops


def mean_embed(ego, matrices):
    all_hops = hops(ego, matrices)
    return sum(all_hops) / len(all_hops)


def ego_weights():
    return {"ego_embeddings": torch.cat([table(USERS, 0.3), table(ITEMS, 1.1)]).requires_grad_()}


def lightgcn():
    weights = ego_weights()
    ego, cases = weights["ego_embeddings"], []
    for n, case in enumerate(LOSSES):
        layers = 1 + n % 3
        final = mean_embed(ego, [adjacency(TRAIN)] * layers)
        loss = ranking_loss(final[:USERS], final[USERS:], case) + l2_term(ego[:USERS], ego[USERS:], case)
        later = mean_embed(ego, [adjacency(LATER)] * layers)
        if case.get("cosine"):
            final, later = unit(final), unit(later)
        cases.append(
            solved(hyper(case, layers=layers), loss, weights, draw=case["draw"], final=flat(final), later=flat(later))
        )
    return weights, cases


def pool(all_hops, how):
    if how == "concat":
        return torch.cat(all_hops, -1)
    if how == "final":
        return all_hops[-1]
    total = sum(all_hops)
    return total / len(all_hops) if how == "mean" else total


def mixgcf():
    """The candidates' hops are mixed one by one and compared after the mixing, as the paper has it."""
    weights = ego_weights()
    ego, cases = weights["ego_embeddings"], []
    unseen = [[i for i in range(ITEMS) if (u, i) not in TRAIN] for u in range(USERS)]
    settings = [("mean", 1, 3, 0.1), ("concat", 2, 2, 0.0), ("sum", 1, 2, 0.02), ("final", 3, 2, 0.0)]
    for n, (pooling, negatives, layers, l2) in enumerate(settings):
        random = torch.Generator().manual_seed(n)
        m = 3
        candidates = [
            [unseen[u][int(torch.randint(len(unseen[u]), (), generator=random))] for u, _ in PAIRS for _ in range(m)]
            for _ in range(negatives)
        ]
        mixing = [torch.rand(len(PAIRS), layers + 1, generator=random) for _ in range(negatives)]
        all_hops = hops(ego, [adjacency(TRAIN)] * layers)
        final = pool(all_hops, pooling)
        total = torch.zeros(())
        for p, (u, i) in enumerate(PAIRS):
            total = total + l2 / 2 * (ego[u].pow(2).sum() + ego[USERS + i].pow(2).sum())
            inner = torch.ones(())
            for k in range(negatives):
                chosen = []
                for layer, hop in enumerate(all_hops):
                    user = hop[u] if pooling == "concat" else final[u]
                    a = mixing[k][p, layer]
                    mixed = [a * hop[USERS + i] + (1 - a) * hop[USERS + j] for j in candidates[k][p * m:(p + 1) * m]]
                    chosen.append(max(mixed, key=lambda x: (user @ x).item()))
                total = total + l2 / 2 * chosen[0].pow(2).sum()
                inner = inner + torch.exp(final[u] @ pool(chosen, pooling) - final[u] @ final[USERS + i])
            total = total + torch.log(inner)
        given = {
            "embedding_dim": DIM, "layers": layers, "pooling": pooling, "negatives": negatives, "candidates": m, "l2": l2,
            "message_dropout": 0.0,
        }
        later = pool(hops(ego, [adjacency(LATER)] * layers), pooling)
        extra = {
            "candidates": candidates, "mixing_weights": [flat(x) for x in mixing],
            "final": flat(final), "later": flat(later),
        }
        cases.append(solved(given, total / len(PAIRS), weights, **extra))
    return weights, cases


def info_nce(a, b, temperature):
    scores = unit(a) @ unit(b).T / temperature
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(a)))


def sgl():
    weights = ego_weights()
    ego, cases = weights["ego_embeddings"], []
    edges = sorted(set(TRAIN))
    users, items = sorted({u for u, _ in PAIRS}), sorted({i for _, i in PAIRS})
    for n, (augmentation, layers, weight, temperature) in enumerate(
        [("edge-drop", 2, 0.1, 0.2), ("random-walk", 2, 0.5, 0.4), ("node-drop", 3, 1.0, 0.2)]
    ):
        case = LOSSES[[0, 3, 5][n]]
        random = torch.Generator().manual_seed(n)
        views = 2 if augmentation == "random-walk" else 1
        keep = [[(torch.rand(len(edges), generator=random) > 0.3).tolist() for _ in range(views)] for _ in range(2)]
        final = mean_embed(ego, [adjacency(TRAIN)] * layers)
        loss = ranking_loss(final[:USERS], final[USERS:], case) + l2_term(ego[:USERS], ego[USERS:], case)
        a, b = (
            mean_embed(ego, [adjacency([e for e, k in zip(edges, view[min(layer, views - 1)]) if k]) for layer in range(layers)])
            for view in keep
        )
        contrast = info_nce(a[:USERS][users], b[:USERS][users], temperature)
        contrast = contrast + info_nce(a[USERS:][items], b[USERS:][items], temperature)
        given = hyper(
            case, layers=layers, augmentation=augmentation, contrast_weight=weight, contrast_temperature=temperature
        )
        later = mean_embed(ego, [adjacency(LATER)] * layers)
        extra = {"draw": case["draw"], "keep": keep, "final": flat(final), "later": flat(later)}
        cases.append(solved(given, loss + weight * contrast, weights, **extra))
    return weights, cases


def write(name, made, **more):
    weights, cases = made
    case = {
        "users": USERS, "items": ITEMS, "train": TRAIN, "later": LATER, "pairs": PAIRS,
        "weights": {name: flat(w) for name, w in weights.items()}, **more, "cases": cases,
    }
    os.makedirs(FOLDER, exist_ok=True)
    with open(os.path.join(FOLDER, f"{name}.json"), "w") as file:
        json.dump(case, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    write("mf", mf())
    write("lightgcn", lightgcn())
    write("mixgcf", mixgcf())
    write("sgl", sgl())
