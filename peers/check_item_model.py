"""Scores of a fitted item model (`train_items`) by transformers, beside those that `recommend` gave.

    python peers/check_item_model.py --model FOLDER --history HISTORY.parquet --list SHORTLIST.parquet [--users 20]
                                     [--golden FILE]

FOLDER holds `model.json` and `model.safetensors` (the stage's artifact). The layers run in `LlamaModel` (or the model's own
class) over `inputs_embeds`; nothing of tailfuse is used. Prints the greatest difference of a score, and exits with 1 above
1e-3 of the scores' deviation. `--golden` keeps histories and scores of all items, by index: tests/golden/llm/item is a model of two
layers over 40 invented titles, fitted by `train_items` as in tests/it/item_mode.rs. Needs torch, transformers, safetensors, pyarrow, numpy.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModel


def ids(tensors, name):
    """Ids of a table in the order of its rows."""
    values = tensors[name]
    offsets = tensors.get(name + ".offsets")
    if offsets is None:
        return [int(v) for v in values]
    raw = values.tobytes()
    return [raw[a:b].decode() for a, b in zip(offsets[:-1], offsets[1:])]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--history", type=pathlib.Path, required=True)
    parser.add_argument("--list", type=pathlib.Path, required=True)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--golden", type=pathlib.Path)
    args = parser.parse_args()

    card = json.loads((args.model / "model.json").read_text())["hyper"]
    tensors = load_file(args.model / "model.safetensors")
    config = {k: v for k, v in card["config"].items() if v is not None}
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    config.vocab_size = 8  # no token is embedded
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    layers = {k.removeprefix("model."): torch.from_numpy(v) for k, v in tensors.items() if k.startswith("model.")}
    missing, unexpected = model.load_state_dict(layers, strict=False)
    assert missing == ["embed_tokens.weight"] and not unexpected, (missing, unexpected)

    titles, projection = tensors["item_titles"], tensors["item_projection"]
    table = torch.from_numpy(titles @ projection.T + tensors["item_residuals"])
    places = {item: n for n, item in enumerate(ids(tensors, "item_ids"))}
    history = pq.read_table(args.history, columns=["user_id", "item_id", "position"]).to_pandas()
    history = history.sort_values(["user_id", "position"], kind="stable")
    shortlist = pq.read_table(args.list).to_pandas()

    worst, deviation, golden = 0.0, [], []
    for user in sorted(shortlist["user_id"].unique())[: args.users]:
        read = [places[i] for i in history[history["user_id"] == user]["item_id"]][-card["max_len"] :]
        with torch.no_grad():
            state = model(inputs_embeds=table[read][None]).last_hidden_state[0, -1] * card["scale"]
        scores = (table @ state).numpy()
        golden.append({"history": read, "scores": [float(f"{x:.7g}") for x in scores]})
        rows = shortlist[shortlist["user_id"] == user]
        want = scores[[places[i] for i in rows["item_id"]]]
        worst = max(worst, float(np.abs(want - rows["rec_score"].to_numpy()).max()))
        deviation.append(float(scores.std()))
    if args.golden:
        args.golden.write_text(json.dumps(golden))
    share = worst / float(np.mean(deviation))
    print(f"{len(deviation)} users: greatest difference {worst:.2e}, {share:.1e} of a row's deviation")
    sys.exit(share > 1e-3)


if __name__ == "__main__":
    main()
