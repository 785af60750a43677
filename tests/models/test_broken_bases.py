"""A base that is broken, or is not a base model, is named for what it is."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratune.errors import LoratuneError, ModelError
from loratune.models.build import read_transformers_config
from loratune.models.fingerprint import base_fingerprint
from loratune.models.source import read_model_config
from loratune.models.weights import is_finite, read_header


def weights(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_numbers_that_are_none_are_counted_and_placed(tmp_path: Path, dtype: torch.dtype) -> None:
    bad = torch.ones(3, 5, dtype=dtype)
    bad[1, 2], bad[2, 0], bad[2, 4] = float("nan"), float("inf"), -float("inf")
    folder = weights(tmp_path / "base", bad=bad, good=torch.ones(4, dtype=dtype))
    with pytest.raises(ModelError) as caught:
        base_fingerprint(folder)
    assert "3 of 15 numbers of 'bad'" in caught.value.cause
    assert "[1, 2]" in caught.value.cause and "good" not in caught.value.cause


def test_every_broken_tensor_is_named_at_once(tmp_path: Path) -> None:
    nan = torch.full((2, 2), float("nan"))
    folder = weights(tmp_path / "base", a=nan, b=torch.ones(2), c=nan.clone())
    with pytest.raises(LoratuneError) as caught:
        base_fingerprint(folder)
    text = " ".join(caught.value.lines())
    assert "'a'" in text and "'c'" in text and "'b'" not in text and caught.value.exit_code == 4


def test_large_empty_and_whole_numbers_are_finite() -> None:
    assert is_finite(torch.tensor([3e38, -3e38])) and is_finite(torch.ones(3, dtype=torch.int64))
    assert is_finite(torch.empty(0, 4)) and not is_finite(torch.tensor([1.0, float("nan"), 2.0]))


def test_a_tensor_name_that_occurs_twice_is_named(tmp_path: Path) -> None:
    item = '{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    header = f'{{"w":{item % (0, 4)},"w":{item % (4, 8)}}}'.encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ModelError, match="'w' occurs twice"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("adapter_config.json", {"base_model_name_or_path": "org/base"}, ["adapter", "org/base"]),
        ("recipe.yaml", {}, ["a run folder", "merged"]),
        ("manifest.json", {}, ["a checkpoint", "resume"]),
    ],
)
def test_what_is_not_a_base_model_is_named_for_what_it_is(
    tmp_path: Path, file: str, content: object, words: list[str]
) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ModelError) as caught:
        read_model_config(tmp_path)
    assert all(word in caught.value.lines()[0] for word in words)


def test_a_folder_with_base_and_adapter_asks_which_is_meant(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="a base model and an adapter"):
        read_model_config(tmp_path)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_checkpoint_of_another_kind_is_named_for_what_it_is(tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"checkpoints of type '{kind}'"):
        read_transformers_config(tmp_path)
