"""A model's GGUF file, read back by transformers and by the package of the format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gguf_files.bases import ROWS, TYPES, adapted, tiny_base
from loratune.adapter_files.into_model import wrap_for_loading
from loratune.config.schema import GgufConfig, GgufDtype, Verify
from loratune.models.load import load_model
from loratune.stages.export_gguf import export_gguf

READ_BY_TRANSFORMERS = [name for name in TYPES if name not in ("gemma", "mistral")]


def exported(base: Path, tmp_path: Path, dtype: str = "f32", **settings: Any) -> Path:
    adapter = adapted(base, tmp_path / "adapter", **settings)
    config = GgufConfig(dtype=GgufDtype(dtype))
    export_gguf(adapter, base, tmp_path / "out", config, alone=False, verify=Verify.weights)
    return tmp_path / "out" / "model.gguf"


@torch.inference_mode()
def own_logits(base: Path, tmp_path: Path, ids: torch.Tensor) -> torch.Tensor:
    from loratune.adapter_files.peft_format import read_adapter

    adapter = read_adapter(tmp_path / "adapter")
    wrapped = wrap_for_loading(load_model(base, torch.float32), adapter)
    return wrapped.model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
@torch.inference_mode()
def test_transformers_computes_the_same_from_the_file(name: str, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", name)
    file = exported(base, tmp_path)
    ids = torch.randint(0, ROWS, (2, 20), generator=torch.Generator().manual_seed(2))
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        config=AutoConfig.from_pretrained(base),  # it does not read all of Gemma's keys
    )
    torch.testing.assert_close(
        model.eval()(input_ids=ids).logits, own_logits(base, tmp_path, ids), rtol=1e-4, atol=1e-4
    )
