"""Golden values of the rating models: predictions, loss and gradients on a tiny case, by PyTorch in double precision.

Run it in the project's root with a Python that has torch: `python peers/golden_rating.py`. It writes
tests/golden/recommenders/{deepfm,nfm,dcn,afm,xdeepfm,autoint}.json, which the unit tests of src/recommenders read. The
same script gives the same files. Formulas are those of the papers named in the headers of the Rust files.
"""

import itertools
import json
import math
import pathlib

import torch
import torch.nn.functional as F

torch.set_default_dtype(torch.float64)

USERS, ITEMS, DIM = 3, 4, 4
# One categorical field per user, one list per item, one number per row; table rows: users 0..4, items 4..9,
# ages 9..13, genres 13..17 (each block begins with the row of unknown values).
AGES = [10, 20, 30]
USER_AGE = [20, None, 10]
GENRES = ["a", "b", "c"]
ITEM_GENRES = [["a", "c"], [], ["b"], ["c", "b", "a"]]
HOURS = [1.0, 3.0, 2.0, 6.0, 3.0]
ROW_USER = [0, 1, 2, 0, 0]
ROW_ITEM = [3, 0, 1, 2, 3]
RATINGS = [5.0, 3.0, 1.0, 4.0, 2.0]
ROWS = 17
FIELDS = 4

# Which hyper-parameters each model has, and the cases to try.
DNN = {"dnn_hidden_units": [6, 5], "l2_reg_dnn": 0.02, "dnn_dropout": 0.0, "dnn_activation": "relu", "dnn_use_bn": False}
COMMON = {"embedding_dim": DIM, "l2_reg_linear": 0.03, "l2_reg_embedding": 0.05}
CASES = {
    "deepfm": [
        {"use_fm": True, **DNN},
        {"use_fm": True, **DNN, "dnn_use_bn": True, "dnn_activation": "prelu"},
        {"use_fm": False, **DNN, "dnn_activation": "sigmoid"},
        {"use_fm": True, **DNN, "dnn_hidden_units": []},
    ],
    "nfm": [{"bi_dropout": 0.0, **DNN}, {"bi_dropout": 0.0, **DNN, "dnn_hidden_units": []}],
    "dcn": [
        {"cross_num": 3, "cross_parameterization": "vector", "l2_reg_cross": 0.01, **DNN},
        {"cross_num": 2, "cross_parameterization": "matrix", "l2_reg_cross": 0.01, **DNN},
        {"cross_num": 2, "cross_parameterization": "matrix", "l2_reg_cross": 0.0, **DNN, "dnn_hidden_units": []},
        {"cross_num": 0, "cross_parameterization": "vector", "l2_reg_cross": 0.01, **DNN},
    ],
    "afm": [
        {"use_attention": True, "attention_factor": 3, "l2_reg_att": 0.04, "afm_dropout": 0.0},
        {"use_attention": False, "attention_factor": 3, "l2_reg_att": 0.04, "afm_dropout": 0.0},
    ],
    "xdeepfm": [
        {"cin_layer_size": [6, 4], "cin_split_half": True, "cin_activation": "relu", "l2_reg_cin": 0.01, **DNN},
        {"cin_layer_size": [3, 5, 2], "cin_split_half": False, "cin_activation": "linear", "l2_reg_cin": 0.0, **DNN},
        {"cin_layer_size": [6, 4], "cin_split_half": True, "cin_activation": "sigmoid", "l2_reg_cin": 0.01, **DNN, "dnn_hidden_units": []},
    ],
    "autoint": [
        {"att_layer_num": 2, "att_embedding_size": 3, "att_head_num": 2, "att_res": True, **DNN},
        {"att_layer_num": 1, "att_embedding_size": 5, "att_head_num": 1, "att_res": False, **DNN, "dnn_hidden_units": []},
    ],
}


def values(generator, *shape):
    return (torch.randn(*shape, generator=generator) * 0.6).requires_grad_()


class Case:
    """The weights of a case by name, made on first use, and its forward pass."""

    def __init__(self, hyper, seed):
        self.h = hyper
        self.generator = torch.Generator().manual_seed(seed)
        self.w = {}
        self.squares = []  # (weight in the loss, tensor)

    def get(self, name, *shape, l2=0.0):
        tensor = self.w.setdefault(name, values(self.generator, *shape))
        if l2:
            self.squares.append((l2, tensor))
        return tensor

    def read(self, row):
        """Embedding and linear weight of a table row; each reading counts in the L2 term."""
        e, l = self.get("embeddings", ROWS, DIM)[row], self.get("linear", ROWS, 1)[row]
        self.squares.append((self.h["l2_reg_embedding"] / len(RATINGS), e))
        self.squares.append((self.h["l2_reg_linear"] / len(RATINGS), l))
        return e, l

    def fields(self, n):
        u, i = ROW_USER[n], ROW_ITEM[n]
        age = 0 if USER_AGE[u] is None else 1 + AGES.index(USER_AGE[u])
        singles = [self.read(r) for r in (1 + u, 5 + i, 9 + age)]
        listed = [self.read(13 + g) for g in ([1 + GENRES.index(g) for g in ITEM_GENRES[i]] or [0])]
        pooled = tuple(sum(part) / len(listed) for part in zip(*listed))
        e, l = zip(*(singles + [pooled]))
        return torch.stack(e), sum(l)

    def mlp(self, x):
        h = self.h
        for n, units in enumerate(h["dnn_hidden_units"]):
            x = x @ self.get(f"dnn.{n}.weight", x.shape[1], units, l2=h["l2_reg_dnn"]) + self.get(f"dnn.{n}.bias", units)
            if h["dnn_use_bn"]:
                scale, shift = self.get(f"dnn.{n}.bn.scale", units), self.get(f"dnn.{n}.bn.shift", units)
                x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * scale + shift
            if h["dnn_activation"] == "prelu":
                slope = self.get(f"dnn.{n}.slope", 1)
                x = torch.where(x > 0, x, slope * x)
            else:
                x = {"relu": F.relu, "sigmoid": torch.sigmoid, "linear": lambda x: x}[h["dnn_activation"]](x)
        return x

    def deepfm(self, e, flat, dense):
        y = torch.zeros(len(e))
        if self.h["use_fm"]:
            y = y + sum((e[:, i] * e[:, j]).sum(-1) for i, j in itertools.combinations(range(FIELDS), 2))
        if self.h["dnn_hidden_units"]:
            hidden = self.mlp(flat)
            y = y + (hidden @ self.get("dnn.out", hidden.shape[1], 1, l2=self.h["l2_reg_dnn"]))[:, 0]
        return y

    def nfm(self, e, flat, dense):
        pooled = sum(e[:, i] * e[:, j] for i, j in itertools.combinations(range(FIELDS), 2))
        hidden = self.mlp(torch.cat([pooled, dense], 1))
        return (hidden @ self.get("dnn.out", hidden.shape[1], 1, l2=self.h["l2_reg_dnn"]))[:, 0]

    def dcn(self, e, flat, dense):
        x, width, parts = flat, flat.shape[1], []
        for n in range(self.h["cross_num"]):
            matrix = self.h["cross_parameterization"] == "matrix"
            w = self.get(f"cross.{n}.weight", width, width if matrix else 1, l2=self.h["l2_reg_cross"])
            b = self.get(f"cross.{n}.bias", width)
            x = flat * (x @ w + b) + x if matrix else flat * (x @ w) + b + x
        if self.h["cross_num"]:
            parts.append(x)
        if self.h["dnn_hidden_units"]:
            parts.append(self.mlp(flat))
        both = torch.cat(parts, 1)
        return (both @ self.get("out", both.shape[1], 1, l2=self.h["l2_reg_dnn"]))[:, 0]

    def afm(self, e, flat, dense):
        pairs = torch.stack([e[:, i] * e[:, j] for i, j in itertools.combinations(range(FIELDS), 2)], 1)
        if not self.h["use_attention"]:
            return pairs.sum((1, 2))
        factor = self.h["attention_factor"]
        w = self.get("attention.w", DIM, factor, l2=self.h["l2_reg_att"])
        hidden = F.relu(pairs @ w + self.get("attention.b", factor))
        shares = torch.softmax((hidden @ self.get("attention.h", factor, 1))[..., 0], 1)
        return (torch.einsum("bp,bpd->bd", shares, pairs) @ self.get("attention.p", DIM, 1))[:, 0]

    def xdeepfm(self, e, flat, dense):
        x, outputs, sizes = e, [], self.h["cin_layer_size"]
        for k, maps in enumerate(sizes):
            w = self.get(f"cin.{k}.weight", x.shape[1] * FIELDS, maps, l2=self.h["l2_reg_cin"])
            w = w.reshape(FIELDS, x.shape[1], maps)
            x = torch.einsum("bid,bjd,jih->bhd", x, e, w) + self.get(f"cin.{k}.bias", maps)[None, :, None]
            x = {"relu": F.relu, "sigmoid": torch.sigmoid, "linear": lambda x: x}[self.h["cin_activation"]](x)
            if self.h["cin_split_half"] and k + 1 < len(sizes):
                x, out = x[:, : maps // 2], x[:, maps // 2 :]
            else:
                out = x
            outputs.append(out.sum(-1))
        maps = torch.cat(outputs, 1)
        y = (maps @ self.get("cin.out", maps.shape[1], 1))[:, 0]
        if self.h["dnn_hidden_units"]:
            hidden = self.mlp(flat)
            y = y + (hidden @ self.get("dnn.out", hidden.shape[1], 1, l2=self.h["l2_reg_dnn"]))[:, 0]
        return y

    def autoint(self, e, flat, dense):
        x, size, width = e, self.h["att_embedding_size"], self.h["att_embedding_size"] * self.h["att_head_num"]
        for n in range(self.h["att_layer_num"]):
            names = ["query", "key", "value"] + (["residual"] if self.h["att_res"] else [])
            q, k, v, *res = (x @ self.get(f"attention.{n}.{name}", x.shape[2], width) for name in names)
            heads = []
            for at in range(0, width, size):
                part = slice(at, at + size)
                shares = torch.softmax(torch.einsum("bik,bjk->bij", q[..., part], k[..., part]), -1)
                heads.append(shares @ v[..., part])
            x = F.relu(torch.cat(heads, -1) + (res[0] if res else 0.0))
        parts = [x.flatten(1)] if self.h["att_layer_num"] else []
        if self.h["dnn_hidden_units"]:
            parts.append(self.mlp(flat))
        both = torch.cat(parts, 1)
        return (both @ self.get("out", both.shape[1], 1))[:, 0]


def run(model, hyper, seed):
    case = Case(hyper, seed)
    bias, dense_weights = case.get("bias", 1), case.get("dense", 1, 1)
    mean = sum(HOURS) / len(HOURS)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in HOURS) / len(HOURS))
    dense = torch.tensor([[(x - mean) / deviation] for x in HOURS])
    embeddings, linear = zip(*(case.fields(n) for n in range(len(RATINGS))))
    e = torch.stack(embeddings)
    flat = torch.cat([e.flatten(1), dense], 1)
    y = bias + torch.stack(linear)[:, 0] + (dense @ dense_weights)[:, 0] + getattr(case, model)(e, flat, dense)
    loss = ((y - torch.tensor(RATINGS)) ** 2).mean() + sum(weight * (t**2).sum() for weight, t in case.squares)
    loss.backward()
    flat_list = lambda t: [round(x, 9) for x in t.detach().flatten().tolist()]
    tensors = {
        name: {"shape": list(t.shape), "values": flat_list(t), "gradient": flat_list(t.grad)}
        for name, t in case.w.items()
    }
    return {"hyper": hyper, "predicted": flat_list(y), "loss": round(loss.item(), 9), "tensors": tensors}


def main():
    to = pathlib.Path("tests/golden/recommenders")
    to.mkdir(parents=True, exist_ok=True)
    for model, cases in CASES.items():
        out = [run(model, {**COMMON, **case}, 7 + n) for n, case in enumerate(cases)]
        (to / f"{model}.json").write_text(json.dumps(out) + "\n")
        print(model, [round(c["loss"], 4) for c in out])


if __name__ == "__main__":
    main()
