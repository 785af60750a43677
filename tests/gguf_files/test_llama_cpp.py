"""llama.cpp itself, on tiny models of every type that is written for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_files.bases import TYPES, adapted, tiny_base
from gguf_files.test_tokenizer import sentence_piece
from loratune.config.schema import GgufConfig, GgufDtype
from loratune.errors import MergeError
from loratune.stages.export_gguf import export_gguf

pytest.importorskip("llama_cpp", reason="llama.cpp is not installed")
pytestmark = pytest.mark.slow


def asked(tmp_path: Path, name: str, dtype: str = "f16", **changes: Any) -> dict[str, Any]:
    """What llama.cpp made of loratune's answers."""
    base = tiny_base(tmp_path / "base", name, **changes)
    config = GgufConfig(dtype=GgufDtype(dtype))
    certificate = export_gguf(
        adapted(base, tmp_path / "adapter"), base, tmp_path / "out", config, alone=False
    )
    assert (
        json.loads((tmp_path / "out" / "certificate.json").read_text())["llama_cpp"]
        == (certificate["llama_cpp"])
    )
    result: dict[str, Any] = certificate["llama_cpp"]
    assert result["prompts_tokenized_alike"] == result["prompts"] == 20
    return result


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", TYPES)
def test_llama_cpp_answers_as_loratune_does(name: str, dtype: str, tmp_path: Path) -> None:
    proof = asked(tmp_path, name, dtype)
    assert proof["mean_kl"] < {"f32": 1e-5, "f16": 1e-4, "bf16": 2e-3, "q8_0": 2e-2}[dtype]
    assert proof["mean_kl"] < proof["mean_kl_base"] / 10
    assert proof["agreement"] > {"f32": 0.99, "f16": 0.98, "bf16": 0.9, "q8_0": 0.8}[dtype]


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3's positions": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "linear positions": (
        "qwen3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}}
    ),
    "another base of positions": (
        "qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    ),
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "eight layers, two that see everything": ("gemma3_text", {"num_hidden_layers": 8}),
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_reach_llama_cpp(setting: str, tmp_path: Path) -> None:
    name, changes = SETTINGS[setting]
    assert asked(tmp_path, name, "f32", **changes)["mean_kl"] < 1e-5


@pytest.mark.parametrize("prepend", [False, True])
def test_sentence_piece_is_followed_token_by_token(prepend: bool, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "gemma")
    sentence_piece(prepend=prepend).save_pretrained(base)
    adapter = adapted(base, tmp_path / "adapter")
    proof = export_gguf(adapter, base, tmp_path / "out", GgufConfig(), alone=False)["llama_cpp"]
    assert proof["texts_tokenized_otherwise"] == []
    assert proof["mean_kl"] < 1e-4


def test_rows_in_the_wrong_order_are_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratune.gguf_files.tensors import TensorNames

    monkeypatch.setattr(TensorNames, "rows", lambda _, parameter, value: value)
    with pytest.raises(MergeError, match="llama"):
        asked(tmp_path, "llama")
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratune.gguf_files import model_file

    right = model_file.read_tokenizer

    def wrong(*arguments: Any) -> Any:
        found = right(*arguments)
        return replace(found, merges=found.merges[100:])

    monkeypatch.setattr(model_file, "read_tokenizer", wrong)
    with pytest.raises(MergeError, match="tokenizes"):
        asked(tmp_path, "llama")


@pytest.mark.parametrize("variant", ["lora", "lora_fa", "vera"])
@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_an_adapter_runs_on_a_base_of_its_own(variant: str, dtype: str, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    file = base_file(base, tmp_path, dtype)
    settings: dict[str, Any] = {} if variant == "vera" else {"alpha": 16}
    adapter = adapted(base, tmp_path / "adapter", variant, **settings)
    config = GgufConfig(base=str(file))
    proof = export_gguf(adapter, base, tmp_path / "alone", config, alone=True)["llama_cpp"]
    assert proof["mean_kl"] < proof["mean_kl_base"] / (5 if dtype == "f16" else 1)
    assert proof["gap_bound"] is None


def test_an_adapter_of_the_wrong_scale_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratune.gguf_files import adapter_file

    base = tiny_base(tmp_path / "base", "llama")
    file, adapter = base_file(base, tmp_path, "f16"), adapted(base, tmp_path / "adapter")
    right = adapter_file.plain_lora

    def wrong(*arguments: Any) -> Any:
        settings, tensors = right(*arguments)
        return {**settings, "lora_alpha": 0}, {
            k: v * -1 if "_B" in k else v for k, v in tensors.items()
        }

    monkeypatch.setattr(adapter_file, "plain_lora", wrong)
    with pytest.raises(MergeError, match="more like the base"):
        export_gguf(adapter, base, tmp_path / "alone", GgufConfig(base=str(file)), alone=True)


def base_file(base: Path, tmp_path: Path, dtype: str) -> Path:
    """The base itself as GGUF: merged with an adapter that all but does nothing."""
    from loratune.adapter_files.peft_format import read_adapter, write_adapter
    from loratune.adapters.registry import config_class
    from loratune.config.schema import TargetsConfig, Verify
    from loratune.models.load import load_model
    from loratune.surgery import wrap_model

    model = load_model(base, torch.float32)
    wrapped = wrap_model(model, config_class("lora")(rank=1), TargetsConfig(modules=["o_proj"]))
    with torch.no_grad():
        for parameter in wrapped.model.parameters():
            if parameter.requires_grad:
                parameter.fill_(1e-12)
    folder = tmp_path / "nothing"
    folder.mkdir()
    write_adapter(folder, wrapped, {}, str(base))
    config = GgufConfig(dtype=GgufDtype(dtype))
    export_gguf(
        read_adapter(folder), base, tmp_path / "plain", config, alone=False, verify=Verify.weights
    )
    return tmp_path / "plain" / "model.gguf"
