"""An adapter's GGUF file: B A in llama.cpp's order of rows is ΔW of the trained adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from gguf_files.bases import WIDE, adapted, tiny_base
from loratune.adapter_files.offline import attach
from loratune.config.schema import GgufConfig
from loratune.errors import ModelError
from loratune.gguf_files.reading import value_of
from loratune.stages.export_gguf import export_gguf

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"alpha": 16}),
    "lora, own ranks": ("lora", {"alpha": 8, "rank_pattern": {"k_proj": 2}}),
    "lora, own alphas": ("lora", {"alpha": 8, "alpha_pattern": {"v_proj": 1}}),
    "rslora": ("lora", {"alpha": 8, "rslora": True}),
    "lora_fa": ("lora_fa", {"alpha": 8}),
    "vera": ("vera", {}),
}


def exported(base: Path, tmp_path: Path, **settings: Any) -> tuple[Any, GGUFReader]:
    adapter = adapted(base, tmp_path / "adapter", **settings)
    certificate = export_gguf(adapter, base, tmp_path / "out", GgufConfig(), alone=True)
    assert certificate["form"] == "gguf-lora"
    return adapter, GGUFReader(tmp_path / "out" / "adapter.gguf")


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row 2i of a head is transformers' row i, row 2i + 1 its row i + half."""
    out, size = np.empty_like(rows), rows.shape[0] // heads
    for head in range(heads):
        for place in range(size // 2):
            out[head * size + 2 * place] = rows[head * size + place]
            out[head * size + 2 * place + 1] = rows[head * size + place + size // 2]
    return out


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_the_factors_are_the_whole_correction(form: str, tmp_path: Path) -> None:
    variant, settings = FORMS[form]
    base = tiny_base(tmp_path / "base", "llama")
    adapter, reader = exported(base, tmp_path, variant=variant, **settings)
    assert value_of(reader, "general.type") == "adapter"
    assert value_of(reader, "general.architecture") == "llama"
    assert value_of(reader, "adapter.type") == "lora"
    stored = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    ranks = {len(stored[name]) for name in stored if name.endswith("lora_a")}
    assert ranks == {int(value_of(reader, "adapter.lora.alpha"))}  # scaling 1
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "down_proj": "ffn_down"}
    layers = attach(base, adapter).wrapped.adapters
    assert len(stored) == 2 * len(layers) == 16
    for module, layer in layers.items():
        number, word = module.split(".")[2], module.rsplit(".", 1)[1]
        weight = f"blk.{number}.{names[word]}.weight"
        delta = layer.delta_weight().numpy()
        if word in ("q_proj", "k_proj"):
            delta = interleaved(delta, 2 if word == "q_proj" else 1)
        got = stored[f"{weight}.lora_b"] @ stored[f"{weight}.lora_a"]
        np.testing.assert_allclose(got, delta, rtol=1e-4, atol=1e-6 * np.abs(delta).max())


def test_nothing_is_reordered_where_llama_cpp_rotates_halves(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "qwen3")
    adapter, reader = exported(base, tmp_path, targets=("q_proj",))
    layer = attach(base, adapter).wrapped.adapters["model.layers.1.self_attn.q_proj"]
    stored = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    name = "blk.1.attn_q.weight"
    got = stored[f"{name}.lora_b"] @ stored[f"{name}.lora_a"]
    np.testing.assert_allclose(got, layer.delta_weight().detach().numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("llama", {"targets": ("embed_tokens",)}, "is an embedding"),
        ("llama, tied", {"targets": ("lm_head", "q_proj")}, "head of a tied model"),
        ("llama", {"variant": "ia3"}, "not a product of two factors"),
    ],
)
def test_what_has_no_place_in_the_file_is_named(
    name: str, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    base = tiny_base(tmp_path / "base", name)
    with pytest.raises(ModelError, match=said):
        exported(base, tmp_path, **settings)
    assert not (tmp_path / "out").exists()


def test_the_head_of_a_model_that_is_not_tied_is_adapted(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    _, reader = exported(base, tmp_path, targets=("lm_head",))
    shapes = {tensor.name: np.array(tensor.data).shape for tensor in reader.tensors}
    assert shapes["output.weight.lora_a"] == (4, WIDE["hidden_size"])
