"""Golden values of the sequential backbones, by PyTorch in double precision.

Run with a Python that has torch, from the repository's root: `python peers/golden_sequential.py`. It writes
`tests/golden/recommenders/{sasrec,bert4rec,cl4srec}.json`: a few small cases each, with hyper-parameters, weights, the
sequences of a step, the loss and the gradient of every weight. Nothing here is taken from the Rust code: the
transformer is written from its definition, position by position where that is clearer, and torch differentiates it.
"""

import json
import math
import pathlib

import torch

torch.set_default_dtype(torch.float64)
ITEMS, DIM, INNER, MAX_LEN, BLOCKS, HEADS = 7, 4, 6, 5, 2, 2
OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden" / "recommenders"


def norm(x, w, name):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-8) * w[f"{name}.scale"] + w[f"{name}.shift"]


def linear(x, w, name):
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def attend(x, w, name, causal, recency):
    """One sequence `[length, dim]`, without padding."""
    length, size = x.shape[0], DIM // HEADS
    q, k, v = (linear(x, w, f"{name}.{part}") for part in ("query", "key", "value"))
    rows = []
    for t in range(length):
        heads = []
        for h in range(HEADS):
            at = slice(h * size, (h + 1) * size)
            until = t + 1 if causal else length
            distance = (torch.arange(until) - t).abs()
            fall = recency * 2.0 ** (-8.0 * (h + 1) / HEADS) * distance
            weights = torch.softmax(k[:until, at] @ q[t, at] / math.sqrt(size) - fall, 0)
            heads.append(weights @ v[:until, at])
        rows.append(torch.cat(heads))
    return linear(torch.stack(rows), w, f"{name}.out")


def encode(items, w, case):
    """States `[length, dim]` of one sequence of items."""
    recency = case.get("recency", 0.0)
    activation = gelu if case["activation"] == "gelu" else torch.relu
    x = w["item_embeddings"][items]
    if case["positions"] == "learned":
        x = x + w["position_embeddings"][: len(items)]
    x = norm(x, w, "embedded_norm")
    for n in range(BLOCKS):
        b = f"blocks.{n}"
        feed = lambda y: linear(activation(linear(y, w, f"{b}.up")), w, f"{b}.down")
        if case["norm"] == "pre":
            x = x + attend(norm(x, w, f"{b}.attention_norm"), w, b, case["causal"], recency)
            x = x + feed(norm(x, w, f"{b}.forward_norm"))
        else:
            x = norm(x + attend(x, w, b, case["causal"], recency), w, f"{b}.attention_norm")
            x = norm(x + feed(x), w, f"{b}.forward_norm")
    return norm(x, w, "last_norm") if case["norm"] == "pre" else x


def loss_of(case, w):
    states = []
    for sequence, places in zip(case["sequences"], case["places"]):
        states.append(encode(sequence, w, case)[places])
    states = torch.cat(states)
    targets = torch.tensor(case["targets"])
    table, bias = w["item_embeddings"][:ITEMS], torch.zeros(ITEMS)
    if "head.weight" in w:
        states = norm(gelu(linear(states, w, "head")), w, "head_norm")
        bias = w["item_bias"]
    logits = states @ table.T + bias
    own = torch.arange(len(targets))
    if case["loss"] == "softmax":
        for row, left_out in enumerate(case.get("excluded", [])):
            for item in set(left_out) - {case["targets"][row]}:
                logits = logits.index_put((torch.tensor(row), torch.tensor(item)), torch.tensor(-math.inf))
        loss = torch.nn.functional.cross_entropy(logits, targets)
    elif case["loss"] == "bce":
        yes, no = logits[own, targets], logits[own, torch.tensor(case["negatives"])]
        loss = (torch.nn.functional.softplus(-yes) + torch.nn.functional.softplus(no)).mean()
    else:
        drawn = torch.tensor(case["negatives"])
        no = logits[:, drawn] - torch.tensor(case["negative_logs"])
        no = no.masked_fill(targets[:, None] == drawn[None, :], -math.inf)
        yes = logits[own, targets] - torch.tensor(case["target_logs"])
        loss = (torch.logsumexp(torch.cat([yes[:, None], no], 1), 1) - yes).mean()
    loss = loss + case["l2"] / 2 * (table[targets] ** 2).sum(1).mean()
    if "views" in case:
        views = torch.stack([encode(view, w, case)[-1] for view in case["views"]])
        views = views / views.norm(dim=1, keepdim=True)
        both, half = len(views), len(views) // 2
        total = 0.0
        for n in range(both):
            others = [m for m in range(both) if m != n]
            similarity = views[others] @ views[n] / case["temperature"]
            partner = others.index((n + half) % both)
            total = total - torch.log_softmax(similarity, 0)[partner]
        loss = loss + case["cl_rate"] * total / both
    return loss


def weights(case):
    generator = torch.Generator().manual_seed(case["seed"])
    shapes = {"item_embeddings": [ITEMS + case["mask_row"], DIM]}
    if case["positions"] == "learned":
        shapes["position_embeddings"] = [MAX_LEN, DIM]
    norms = ["embedded_norm"]
    linears = {}
    for n in range(BLOCKS):
        norms += [f"blocks.{n}.attention_norm", f"blocks.{n}.forward_norm"]
        for part in ("query", "key", "value", "out"):
            linears[f"blocks.{n}.{part}"] = (DIM, DIM)
        linears[f"blocks.{n}.up"] = (DIM, INNER)
        linears[f"blocks.{n}.down"] = (INNER, DIM)
    if case["norm"] == "pre":
        norms.append("last_norm")
    if not case["causal"]:
        norms.append("head_norm")
        linears["head"] = (DIM, DIM)
        shapes["item_bias"] = [ITEMS]
    for name in norms:
        shapes[f"{name}.scale"] = shapes[f"{name}.shift"] = [DIM]
    for name, (rows, cols) in linears.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [rows, cols], [cols]
    w = {name: torch.randn(shape, generator=generator).mul(0.5) for name, shape in shapes.items()}
    # What Rust reads is what was computed with: single precision.
    return {name: x.float().double() for name, x in w.items()}


def golden(case):
    w = {name: x.requires_grad_() for name, x in weights(case).items()}
    loss = loss_of(case, w)
    loss.backward()
    pack = lambda x: {"shape": list(x.shape), "values": [float(f"{v:.8g}") for v in x.flatten().tolist()]}
    zero = lambda x: torch.zeros_like(x) if x.grad is None else x.grad
    return {
        **case,
        "weights": {name: pack(x.detach()) for name, x in w.items()},
        "value": loss.item(),
        "gradients": {name: pack(zero(x)) for name, x in w.items()},
    }


SEQUENCES = [[3, 1, 4, 0, 5], [2], [6, 2, 5]]
CAUSAL = {
    "causal": True, "mask_row": 0, "positions": "learned", "sequences": SEQUENCES, "l2": 0.0,
    "places": [[0, 1, 2, 3, 4], [0], [0, 1, 2]], "targets": [1, 4, 0, 5, 2, 6, 2, 5, 1],
}
SHARED = {
    "loss": "sampled-softmax", "negatives": [5, 0, 5, 3], "negative_logs": [-0.7, 0.2, -0.7, -1.1],
    "target_logs": [0.1, -0.4, 0.2, -0.7, 0.3, -0.2, 0.3, -0.7, 0.1],
}
CASES = {
    "sasrec": [
        {**CAUSAL, "name": "post, softmax", "seed": 1, "norm": "post", "activation": "relu", "loss": "softmax"},
        {**CAUSAL, "name": "unseen items only", "seed": 9, "norm": "pre", "activation": "relu", "loss": "softmax",
         "excluded": [[3], [3, 1], [3, 1, 4], [3, 1, 4, 0], [3, 1, 4, 0, 5], [], [6], [6, 2], [6, 1]]},
        {**CAUSAL, "name": "pre, bce", "seed": 2, "norm": "pre", "activation": "gelu", "loss": "bce",
         "negatives": [6, 0, 2, 3, 3, 1, 0, 1, 4], "l2": 0.1},
        {**CAUSAL, **SHARED, "name": "no positions, sampled softmax", "seed": 3, "norm": "post", "activation": "gelu",
         "positions": "none", "recency": 3.0, "l2": 0.2},
    ],
    "bert4rec": [
        {"name": "post, softmax", "seed": 4, "causal": False, "mask_row": 1, "positions": "learned", "norm": "post",
         "activation": "gelu", "loss": "softmax", "l2": 0.0, "sequences": [[3, 7, 4, 0, 7], [7], [7, 2, 5]],
         "places": [[1, 4], [0], [0]], "targets": [1, 5, 2, 6]},
        {"name": "pre, bce", "seed": 5, "causal": False, "mask_row": 1, "positions": "learned", "norm": "pre",
         "activation": "relu", "loss": "bce", "l2": 0.1, "sequences": [[3, 7, 4, 0, 7], [7], [7, 2, 5]],
         "places": [[1, 4], [0], [0]], "targets": [1, 5, 2, 6], "negatives": [2, 6, 0, 3]},
        {"name": "sampled softmax", "seed": 8, "causal": False, "mask_row": 1, "positions": "learned", "norm": "post",
         "activation": "relu", "l2": 0.1, "sequences": [[3, 7, 4, 0, 7], [7], [7, 2, 5]],
         "places": [[1, 4], [0], [0]], "targets": [1, 5, 2, 6], **{**SHARED, "target_logs": [0.1, -0.7, 0.3, -0.2]}},
    ],
    "cl4srec": [
        {**CAUSAL, "name": "softmax", "seed": 6, "mask_row": 1, "norm": "post", "activation": "relu", "loss": "softmax",
         "views": [[1, 4], [2], [6, 7, 5], [3, 7, 4, 7, 5], [2], [2, 6, 5]], "cl_rate": 0.3, "temperature": 0.5},
        {**CAUSAL, "name": "bce", "seed": 7, "mask_row": 1, "norm": "pre", "activation": "relu", "loss": "bce",
         "negatives": [6, 0, 2, 3, 3, 1, 0, 1, 4],
         "views": [[4, 3, 1, 0, 5], [2], [2, 5], [0, 5], [7], [6, 2, 7]], "cl_rate": 0.3, "temperature": 1.0},
    ],
}

if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    for model, cases in CASES.items():
        sizes = {"items": ITEMS, "dim": DIM, "inner": INNER, "max_len": MAX_LEN, "blocks": BLOCKS, "heads": HEADS}
        text = json.dumps({"sizes": sizes, "cases": [golden(case) for case in cases]}, indent=None)
        (OUT / f"{model}.json").write_text(text + "\n")
        print(f"{model}.json: {len(text)} characters")
