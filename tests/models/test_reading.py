"""Rows of a parameter, read from the files, against the model as transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.families import BUILDERS
from support.tiny_models import FAMILIES, logits, save_base

from loratune.config.schema import Quantize
from loratune.errors import ConfigError, ModelError
from loratune.models.load import load_model, load_without_parameters
from loratune.models.quantized.format import Quantization
from loratune.models.unread import UnreadParameters
from loratune.runs import processes
from loratune.stages.load import require_shardable

BASES = {**FAMILIES, **{name: BUILDERS[name] for name in ("gemma3", "laguna", "bert", "qwen3_5")}}
"""Plain and Conv1D layers, a tower for images, fused experts, tied embeddings, nested names."""
PARTS = 3  # no size of the tiny models is a multiple


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parts_together_are_the_parameters_that_transformers_loads(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    folder = save_base(tmp_path / "base", BASES[name]())
    expected = load_model(folder, dtype)
    empty = load_without_parameters(folder, dtype)
    unread = UnreadParameters(empty, folder, dtype, torch.device("cpu"))
    values = dict(expected.named_parameters())
    parameters = dict(empty.named_parameters())
    assert parameters.keys() == values.keys()
    for key, parameter in parameters.items():
        assert parameter.is_meta
        each = -(-len(parameter) // PARTS)
        places = [slice(part * each, (part + 1) * each) for part in range(PARTS)]
        whole = torch.cat([unread.read(parameter, rows) for rows in places])
        assert whole.dtype is values[key].dtype and torch.equal(whole, values[key]), key
    for key, buffer in expected.named_buffers():
        assert torch.equal(empty.get_buffer(key), buffer), key


@pytest.mark.parametrize("name", BASES)
def test_a_model_filled_with_what_was_read_computes_the_same(tmp_path: Path, name: str) -> None:
    folder = save_base(tmp_path / "base", BASES[name]())
    model = load_without_parameters(folder, torch.float32)
    unread = UnreadParameters(model, folder, torch.float32, torch.device("cpu"))
    filled: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for key, empty in list(module.named_parameters(recurse=False)):
            value = torch.nn.Parameter(unread.read(empty), requires_grad=False)
            module.register_parameter(key, filled.setdefault(id(empty), value))
    assert torch.equal(logits(model), logits(load_model(folder, torch.float32)))


def test_files_that_do_not_fit_are_named_before_anything_is_read(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", FAMILIES["llama"](), max_shard_size="8KB")
    numbers = json.loads((folder / "config.json").read_text())
    numbers["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(numbers))
    with pytest.raises(ModelError, match=r"do not fit config\.json"):
        load_without_parameters(folder, torch.float32)


def test_a_quantized_base_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    require_shardable(None)
    with pytest.raises(ConfigError, match=r"quantized base \(nf4\) cannot be sharded"):
        require_shardable(Quantization(Quantize.nf4, in_files=True))
