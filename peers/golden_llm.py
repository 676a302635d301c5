#!/usr/bin/env python3
"""Golden files of the LLM formats: architectures, quantisation types, shards, tokenizers.

  pip install torch transformers gguf safetensors tokenizers sentencepiece protobuf
  python peers/golden_llm.py [--out tests/golden/llm] [--only architectures,types,tokenizers]

Models are tiny and random (seeds below), written as Hugging Face folders by transformers and as GGUF files by
`gguf.GGUFWriter`; ids -> logits come from transformers in float32 on the CPU with eager attention. What is in
`<case>/golden.json`: `ids`, `positions` (which rows), `logits` (those rows). Weights are stored as bfloat16 (their
values are bfloat16 numbers, so a folder and a GGUF of either precision hold the same model) unless the case says so.
Tokenizers are trained here on a few lines of text; `tokenizers` and `sentencepiece` give the ids.
"""
import argparse
import json
import math
import pathlib
import shutil
import tempfile

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
ap.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parents[1] / "tests/golden/llm")
ap.add_argument("--only", default="architectures,types,tokenizers")
a = ap.parse_args()
torch.set_num_threads(1)
torch.manual_seed(0)


def f(x):
    return float(f"{float(x):.7g}")


def dump(path, obj):
    path.write_text(json.dumps(obj, ensure_ascii=False, separators=(",", ":")) + "\n")


def fill(model, seed, spread=1.2):
    """Wide enough that attention, biases, norms and the feed-forward all matter to the logits; bfloat16 numbers."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=g)
            if "bias" in name:
                noise = 0.5 * noise
            elif p.ndim == 1:
                noise = 1 + 0.2 * noise
            elif "embed" in name or "lm_head" in name:
                noise = 0.4 * noise
            else:
                noise = noise * spread / math.sqrt(p.shape[1])
            p.copy_(noise.bfloat16().float())


def logits_of(model, length, seed):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (length,), generator=g).tolist()
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0]
    positions = sorted({0, 1, length // 2, length - 1})
    return {"ids": ids, "positions": positions, "logits": [[f(x) for x in rows[p]] for p in positions]}


def gguf_name(name):
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    if name in whole:
        return whole[name]
    leaves = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }
    _, _, layer, rest = name.split(".", 3)
    leaf, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{leaves[leaf]}.{kind}"


def permute(w, heads):
    """As llama.cpp's convert_hf_to_gguf.py does for `llama`."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def rope(config):
    """`rope_parameters` of transformers 5."""
    return dict(config.rope_parameters)


def llama3_factors(config):
    """`rope_freqs.weight`, as convert_hf_to_gguf.py writes it."""
    r = rope(config)
    old, low, high, factor = r["original_max_position_embeddings"], r["low_freq_factor"], r["high_freq_factor"], r["factor"]
    freqs = 1.0 / (r["rope_theta"] ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim))
    out = []
    for freq in freqs:
        wavelen = 2 * math.pi / freq
        if wavelen < old / high:
            out.append(1)
        elif wavelen > old / low:
            out.append(factor)
        else:
            smooth = (old / wavelen - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, dtype=np.float32)


def write_gguf(path, model, kind_of=lambda name, w: "BF16", raw=None):
    """`kind_of` names the type of a tensor (a matrix; vectors are F32); `raw` gives blocks of types that gguf-py cannot write."""
    c = model.config
    arch = c.model_type
    w = gguf.GGUFWriter(str(path), arch)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(rope(c)["rope_theta"])
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    w.add_key_length(head)
    w.add_value_length(head)
    kind = rope(c)["rope_type"]
    if kind == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(rope(c)["factor"])
    if kind == "llama3":
        w.add_tensor("rope_freqs.weight", llama3_factors(c))
    # A vocabulary of our own, so that llama.cpp opens the file too.
    tokens = [f"t{i}" for i in range(c.vocab_size)]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(tokens)
    w.add_token_types([1] * c.vocab_size)
    w.add_token_merges(["t 0"])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    for name, p in model.named_parameters():
        x = p.detach().float().numpy()
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            x = permute(x, c.num_attention_heads if "q_proj" in name else c.num_key_value_heads)
        kind = "F32" if x.ndim == 1 else kind_of(name, x)
        t = gguf.GGMLQuantizationType[kind]
        data = raw[name][0] if raw and name in raw else (x if kind == "F32" else gguf.quants.quantize(x, t))
        w.add_tensor(gguf_name(name), data, raw_dtype=t)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


BASE = dict(vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            attn_implementation="eager")
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
ARCHITECTURES = {
    # Llama 2: heads of its own for keys, a head of its own.
    "llama2": (LlamaConfig, dict(tie_word_embeddings=False, num_key_value_heads=4, rope_parameters=DEFAULT), 21),
    "llama3": (LlamaConfig, dict(tie_word_embeddings=True, head_dim=16, rope_parameters=LLAMA3), 22),
    "llama_linear": (LlamaConfig, dict(tie_word_embeddings=True, rope_parameters={**DEFAULT, "rope_type": "linear", "factor": 4.0}), 23),
    "qwen2": (Qwen2Config, dict(tie_word_embeddings=True, rope_parameters={**DEFAULT, "rope_theta": 1e6}), 24),
    "qwen2_untied": (Qwen2Config, dict(tie_word_embeddings=False, rms_norm_eps=1e-6, rope_parameters={**DEFAULT, "rope_theta": 1e6}), 25),
    "qwen3": (Qwen3Config, dict(tie_word_embeddings=True, head_dim=16, rope_parameters={**DEFAULT, "rope_theta": 1e6}), 26),
    "qwen3_untied": (Qwen3Config, dict(tie_word_embeddings=False, head_dim=12, rope_parameters=DEFAULT), 27),
}


def architectures():
    for name, (cls, options, seed) in ARCHITECTURES.items():
        config = cls(**{**BASE, **options})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        fill(model, seed)
        folder = a.out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        dump(folder / "golden.json", logits_of(model, 90, seed + 100))
        write_gguf(folder / "model.gguf", model, lambda _, w: "F16" if name == "llama2" else "BF16")
        model.bfloat16()
        if name == "qwen2_untied":
            model.save_pretrained(folder, max_shard_size="12KB")
        elif name == "llama2":
            model.half().save_pretrained(folder)
        else:
            model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)


TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
# Where the half-precision scales of a block are, for types that gguf-py reads only.
SCALES = {"Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0]}


def random_blocks(kind, shape, rng):
    """Random valid blocks whose values have a standard deviation near 1.2 / sqrt(columns)."""
    t = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[t]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // values, size), dtype=np.uint8)
    for at in SCALES[kind]:
        blocks[:, at : at + 2] = np.full((len(blocks), 1), 2.0**-10, np.float16).view(np.uint8)
    spread = gguf.quants.dequantize(blocks.reshape(shape[0], -1), t).std()
    scale = np.float16(2.0**-10 * 1.2 / math.sqrt(shape[1]) / spread)
    for at in SCALES[kind]:
        jitter = (scale * rng.uniform(0.8, 1.2, (len(blocks), 1))).astype(np.float16)
        blocks[:, at : at + 2] = jitter.view(np.uint8)
    data = blocks.reshape(shape[0], -1)
    return data, gguf.quants.dequantize(data, t)


def types():
    """A model whose matrices of 256 columns are of one type; the two with fewer are Q8_0."""
    out = {}
    folder = a.out / "types"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for n, kind in enumerate(TYPES):
        config = LlamaConfig(**{**BASE, "vocab_size": 32, "hidden_size": 256, "head_dim": 8, "intermediate_size": 32,
                                "num_hidden_layers": 1, "rope_parameters": DEFAULT, "tie_word_embeddings": True})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        fill(model, 40 + n)
        rng = np.random.default_rng(60 + n)
        t = gguf.GGMLQuantizationType[kind]
        raw = {}
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim != 2:
                    continue
                narrow = p.shape[1] < 256
                heads = {"q": 4, "k": 2}.get(name.split(".")[-2][0]) if "self_attn.q_" in name or "self_attn.k_" in name else None
                x = p.numpy() if heads is None else permute(p.numpy(), heads)
                if not narrow and kind in SCALES:
                    data, values = random_blocks(kind, x.shape, rng)
                else:
                    this = gguf.GGMLQuantizationType.Q8_0 if narrow else t
                    data = gguf.quants.quantize(x, this)
                    values = gguf.quants.dequantize(data, this)
                raw[name] = (data,)
                if heads is not None:
                    d = x.shape[0] // heads
                    values = values.reshape(heads, d // 2, 2, -1).swapaxes(1, 2).reshape(x.shape)
                p.copy_(torch.from_numpy(np.ascontiguousarray(values)))
        write_gguf(folder / f"{kind}.gguf", model, lambda _, w: "Q8_0" if w.shape[1] < 256 else kind, raw)
        out[kind] = logits_of(model, 12, 80 + n)
    dump(folder / "golden.json", out)


TEXTS = [
    "Hello world", " leading", "trailing ", "two  spaces", "a\nb\r\n\r\nc", "\ttab", "It's we'll THEY'RE", "1234567 and 3.14",
    "naïve café Ünïcödé", "映画を観る", "🎬 film 👩‍👩‍👧", "e\u0301 combined", "<|end|> <s> </s> <unk> <0x41>", "", " ", "   ", "\n", "x" * 40,
    "aaaaaaa", "The night of the night of the river", "½ ² Ⅷ ٣", "a  5 b", "nul\x00byte", "rtl \u202eabc\u202c", "▁under▁score", "mixed\u00a0nbsp",
]
CORPUS = """The night of the river and the lantern. It's the other side of the mountain, they'll say.
Films of 1957, 1964 and 1999: The Long Night, The River's Edge, Return to the Mountain, Lanterns.
A user who has seen The Long Night, Return to the Mountain and Lanterns will choose the next film.
Answer with its letter only. The history lists films that a user has chosen, the latest last.
naïve café, Über den Fluss, El río y la noche, 映画, ночь над рекой, 1234567890."""
PATTERNS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def bpe(pre):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tok = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    level = lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)  # noqa: E731
    if pre == "smollm":
        tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level(True)])
    elif pre in PATTERNS:
        tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERNS[pre]), "isolated"), level(False)])
    else:
        tok.pre_tokenizer = level(True)
    if pre == "qwen2":
        tok.normalizer = normalizers.NFC()
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tok.train_from_iterator(CORPUS.splitlines(), trainer)
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ["<|start|>", "<|end|>"]])
    if pre == "llama-bpe":
        start = tok.token_to_id("<|start|>")
        tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
            single="<|start|> $A", pair="<|start|> $A <|start|> $B", special_tokens=[("<|start|>", start)])])
    return tok


def rows_of(encode, decode):
    return [{"text": t, "ids": (ids := encode(t)), "decoded": decode(ids)} for t in TEXTS]


def vocabulary_gguf(path, model, pre, tokens, types, merges=None, scores=None, add_bos=None, bos=None, eos=None, space=None):
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_tokenizer_model(model)
    if pre:
        w.add_tokenizer_pre(pre)
    w.add_token_list(tokens)
    w.add_token_types(types)
    if merges is not None:
        w.add_token_merges(merges)
    if scores is not None:
        w.add_token_scores(scores)
    if add_bos is not None:
        w.add_add_bos_token(add_bos)
    if space is not None:
        w.add_add_space_prefix(space)
    w.add_bos_token_id(bos)
    w.add_eos_token_id(eos)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def tokenizers():
    folder = a.out / "tokenizers"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    golden = {}
    for pre in ["gpt-2", "smollm", "llama-bpe", "qwen2"]:
        tok = bpe(pre)
        description = json.loads(tok.to_str())
        dump(folder / f"{pre}.json", description)
        vocab = tok.get_vocab()
        tokens = [t for t, _ in sorted(vocab.items(), key=lambda kv: kv[1])]
        assert sorted(vocab.values()) == list(range(len(tokens)))
        start, end = vocab["<|start|>"], vocab["<|end|>"]
        merges = [" ".join(m) for m in description["model"]["merges"]]
        types = [3 if i in (start, end) else 1 for i in range(len(tokens))]
        vocabulary_gguf(folder / f"{pre}.gguf", "gpt2", pre, tokens, types, merges, bos=start, eos=end)
        tok.encode_special_tokens = True
        golden[pre] = {"rows": rows_of(lambda t: tok.encode(t, add_special_tokens=False).ids, lambda i: tok.decode(i, skip_special_tokens=False)),
                       "adds_bos": pre == "llama-bpe", "bos": start}
    golden["spm"] = sentencepiece_case(folder)
    dump(folder / "golden.json", golden)


def sentencepiece_case(folder):
    import sentencepiece as spm

    with tempfile.TemporaryDirectory() as tmp:
        text = pathlib.Path(tmp) / "corpus.txt"
        text.write_text(CORPUS)
        spm.SentencePieceTrainer.train(
            input=str(text), model_prefix=f"{tmp}/m", vocab_size=400, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, add_dummy_prefix=True,
            character_coverage=0.98, num_threads=1, minloglevel=2)
        sp = spm.SentencePieceProcessor(model_file=f"{tmp}/m.model")
    n = sp.get_piece_size()
    kind = lambda i: 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1  # noqa: E731
    tokens, scores = [sp.id_to_piece(i) for i in range(n)], [sp.get_score(i) for i in range(n)]
    types = [kind(i) for i in range(n)]
    vocabulary_gguf(folder / "spm.gguf", "llama", "default", tokens, types, scores=scores, add_bos=True, bos=1, eos=2, space=True)
    # The same pieces as transformers' converters write them into a tokenizer.json: merges in the order of the scores.
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = []
    for piece, i in vocab.items():
        if types[i] == 1 and len(piece) > 1:
            splits = [(piece[:k], piece[k:], i) for k in range(1, len(piece)) if piece[:k] in vocab and piece[k:] in vocab]
            merges += sorted(splits, key=lambda s: (vocab[s[0]], vocab[s[1]]))
    merges.sort(key=lambda s: scores[s[2]], reverse=True)
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    bos = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    for name in ["spm", "spm-first"]:
        tok = Tokenizer(models.BPE(vocab, [(l, r) for l, r, _ in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        if name == "spm":
            # `legacy`: white space before every stretch of text.
            tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        tok.decoder = decoders.Sequence(strip)
        tok.post_processor = bos
        tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ["<unk>", "<s>", "</s>"]])
        dump(folder / f"{name}.json", json.loads(tok.to_str()))
        if name == "spm-first":
            first = {"text": "<s>Hello world</s>the night", "ids": tok.encode("<s>Hello world</s>the night", add_special_tokens=False).ids}
        else:
            legacy = {"text": "<s>Hello world</s>the night", "ids": tok.encode("<s>Hello world</s>the night", add_special_tokens=False).ids}
            tok.encode_special_tokens = True
            disagree = [t for t in TEXTS if tok.encode(t, add_special_tokens=False).ids != sp.encode(t)]
            print("tokenizers and sentencepiece disagree about", disagree)
    rows = rows_of(lambda t: sp.encode(t), lambda i: sp.decode(i))
    return {"rows": rows, "adds_bos": True, "bos": 1, "with_special_first": first, "with_special_legacy": legacy}


for part in a.only.split(","):
    globals()[part]()
total = sum(p.stat().st_size for p in a.out.rglob("*") if p.is_file())
print("all golden files:", total, "bytes")
