"""CPU seconds of one tuning step in PyTorch, beside `finetune`: transformers and peft, f32, one thread.

  pip install torch transformers peft
  python peers/bench_tuning.py --hf FOLDER --examples FILE.jsonl [--n 8]

FOLDER is the model in Hugging Face format, FILE has a JSON object a line with `system`, `prompt`, `response`. The first n
examples are one padded batch, as transformers' trainers make it; CPU time is the process's own, so that other work
on the machine counts less. stdout: a line per case.
"""

import argparse
import json
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--hf", required=True)
parser.add_argument("--examples", required=True)
parser.add_argument("--n", type=int, default=8)
args = parser.parse_args()
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(args.hf)
ids, labels = [], []
for line in list(open(args.examples))[: args.n]:
    row = json.loads(line)
    chat = [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["prompt"]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer.encode(text, add_special_tokens=False)
    answer = tokenizer.encode(row["response"], add_special_tokens=False) + [2]
    ids.append(prompt + answer)
    labels.append([-100] * len(prompt) + answer)
tokens, longest = sum(map(len, ids)), max(map(len, ids))
pad = lambda rows, value: torch.tensor([r + [value] * (longest - len(r)) for r in rows])
batch = {"input_ids": pad(ids, 0), "labels": pad(labels, -100), "attention_mask": pad([[1] * len(i) for i in ids], 0)}

for method in ("lora", "full"):
    model = AutoModelForCausalLM.from_pretrained(args.hf, dtype=torch.float32)
    if method == "lora":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    model.train()
    step = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for n in range(2):
        began = time.process_time()
        step.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step.step()
        spent = time.process_time() - began
    print(json.dumps({"method": method, "tokens": tokens, "padded": longest * len(ids), "cpu_s": round(spent, 2),
                      "tokens_per_cpu_s": round(tokens / spent, 1), "loss": float(loss.detach())}), flush=True)
