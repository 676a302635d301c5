"""Loads what `finetune` exports with transformers and peft, and prints the logits and token ids that they give.

  pip install torch transformers peft
  python peers/check_export.py --model FOLDER --text TEXT [--base FOLDER --adapter FOLDER]

stdout: one JSON document. `ids` are those of `--text` as a user's message in the model's chat template, `model` the
logits after the last of them, `adapter` those of the base with the adapter.
"""

import argparse
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def last_logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].double().tolist()


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--text", required=True)
parser.add_argument("--base")
parser.add_argument("--adapter")
args = parser.parse_args()
torch.set_num_threads(1)

tokenizer = AutoTokenizer.from_pretrained(args.model)
text = tokenizer.apply_chat_template([{"role": "user", "content": args.text}], tokenize=False, add_generation_prompt=True)
ids = tokenizer.encode(text, add_special_tokens=False)
out = {"ids": ids, "model": last_logits(load(args.model), ids)}
if args.adapter:
    from peft import PeftModel

    out["adapter"] = last_logits(PeftModel.from_pretrained(load(args.base), args.adapter), ids)
print(json.dumps(out))
