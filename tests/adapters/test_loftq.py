"""The start that corrects a quantized base: the best low-rank part of what quantizing lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantized import quantized_model, wide_base
from support.tiny_models import logits

from loratune.adapter_files.into_model import wrap_for_loading
from loratune.adapter_files.peft_format import read_adapter, write_adapter
from loratune.adapters.registry import config_class
from loratune.config.schema import TargetsConfig
from loratune.errors import ModelError
from loratune.models.load import load_model
from loratune.models.stored_names import StoredNames
from loratune.models.weights import tensor_entries
from loratune.surgery import WrappedModel, wrap_model

RANK = 6
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]


def wrapped_on(
    folder: Path, variant: str = "lora", *, rank: int = RANK, **settings: Any
) -> WrappedModel:
    model = quantized_model(folder, "nf4")
    read = StoredNames(model, tensor_entries(folder)).read
    config = config_class(variant)(rank=rank, init="loftq", **settings)
    return wrap_model(model, config, TargetsConfig(modules=TARGETS), read_original=read)


@pytest.mark.parametrize("variant", ["lora", "lora_fa", "lora_plus"])
@pytest.mark.parametrize("settings", [{}, {"alpha": 24.0}, {"rslora": True}])
def test_the_start_is_the_best_approximation_of_this_rank(
    variant: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = wide_base(tmp_path)
    plain = load_model(folder, torch.float32)
    wrapped = wrapped_on(folder, variant=variant, **settings)
    for name, adapter in wrapped.adapters.items():
        original = plain.get_parameter(f"{name}.weight").double()
        lost = original - adapter.weight.double()
        left = lost - adapter.delta_weight().detach().double()
        best = torch.linalg.svdvals(lost)[RANK:].norm()
        assert left.norm() < lost.norm()
        torch.testing.assert_close(left.norm(), best, rtol=1e-4, atol=1e-7)


def test_the_model_starts_closer_to_the_base_that_was_quantized(tmp_path: Path) -> None:
    folder = wide_base(tmp_path)
    expected = logits(load_model(folder, torch.float32))
    far = (logits(quantized_model(folder, "nf4")) - expected).norm()
    near = (logits(wrapped_on(folder, rank=32).model) - expected).norm()
    assert near < 0.8 * far


def test_its_file_is_plain_lora_for_everybody(tmp_path: Path) -> None:
    folder = wide_base(tmp_path / "base")
    wrapped = wrapped_on(folder)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", wrapped, {"variant": "lora"}, str(folder))
    again = wrap_for_loading(quantized_model(folder, "nf4"), read_adapter(tmp_path / "adapter"))
    assert torch.equal(logits(again.model), logits(wrapped.model))


def test_it_is_refused_where_nothing_was_lost(tmp_path: Path) -> None:
    folder = wide_base(tmp_path)
    config = config_class("lora")(rank=RANK, init="loftq")
    with pytest.raises(ModelError, match="loftq") as told:
        wrap_model(load_model(folder, torch.float32), config, TargetsConfig(modules=TARGETS))
    assert "model.quantize=nf4" in told.value.fix
