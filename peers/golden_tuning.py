"""Golden gradients and steps for tuning: PyTorch, transformers and peft on tiny random models.

  pip install torch transformers peft safetensors
  python peers/golden_tuning.py            # writes tests/golden/llm/tuning/

golden.json: for three families (biases, head norms, scaled rotary frequencies) the loss of two sequences, each alone and unpadded,
mean over the learned tokens of both; the L2 norm of every gradient; the loss after one step of AdamW. For a LoRA adapter on
`tiny` the same, logits with it, and losses of five steps. `lora/` is that adapter before the first step.
"""

import json
import pathlib

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

ROOT = pathlib.Path(__file__).parents[1] / "tests/golden/llm"
OUT = ROOT / "tuning"
torch.manual_seed(0)
torch.set_num_threads(1)


def load(case):
    model = AutoModelForCausalLM.from_pretrained(ROOT / case, dtype=torch.float32, attn_implementation="eager")
    return model.train()


def sequences(vocab, seed):
    rng = np.random.default_rng(seed)
    out = []
    for n, prompt in ((14, 5), (9, 6)):
        ids = rng.integers(3, vocab, n).tolist()
        out.append({"ids": ids, "mask": [int(i >= prompt) for i in range(n)]})
    return out


def loss_of(model, seqs):
    total, count = 0.0, 0
    for s in seqs:
        ids = torch.tensor([s["ids"]])
        logp = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)
        picked = logp[torch.arange(len(s["ids"]) - 1), ids[0, 1:]]
        mask = torch.tensor(s["mask"][1:], dtype=torch.float32)
        total, count = total - (picked * mask).sum(), count + mask.sum()
    return total / count


def grads(params):
    return {n: float(p.grad.double().norm()) for n, p in params if p.grad is not None}


def steps(model, seqs, n, lr):
    learned = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(learned, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, foreach=False)
    losses = []
    for _ in range(n):
        opt.zero_grad()
        loss = loss_of(model, seqs)
        losses.append(float(loss.detach()))
        loss.backward()
        opt.step()
    losses.append(float(loss_of(model, seqs).detach()))
    return losses


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    golden = {"torch": torch.__version__, "families": {}}
    for case in ("llama3", "qwen2", "qwen3_untied"):
        model = load(case)
        seqs = sequences(model.config.vocab_size, 3)
        loss_of(model, seqs).backward()
        found = grads(model.named_parameters())
        golden["families"][case] = {"sequences": seqs, "grad_l2": found, "losses": steps(model, seqs, 1, 1e-3)}
    model = load("tiny")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False,
                        task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    gen = torch.Generator().manual_seed(5)
    for n, p in model.named_parameters():
        if "lora_" in n:
            p.data = torch.randn(p.shape, generator=gen) * 0.1
    model.save_pretrained(OUT / "lora")
    (OUT / "lora/README.md").unlink(missing_ok=True)
    path = OUT / "lora/adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "tiny"
    path.write_text(json.dumps(config, indent=1, sort_keys=True))
    seqs = sequences(model.config.vocab_size, 4)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([seqs[0]["ids"]])).logits[0].tolist()
    loss_of(model, seqs).backward()
    strip = lambda name: name.removeprefix("base_model.model.").replace(".default", "")
    found = {strip(n): g for n, g in grads(model.named_parameters()).items()}
    golden["lora"] = {"sequences": seqs, "logits": [[round(x, 6) for x in row] for row in logits], "grad_l2": found,
                      "losses": steps(model, seqs, 5, 1e-2)}
    (OUT / "golden.json").write_text(json.dumps(golden, indent=1))


main()
