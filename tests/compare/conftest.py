"""A comparison of the embedded model that takes seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratune.adapters.lora.config import LoRAConfig
from loratune.config.schema import (
    CompareConfig,
    DataConfig,
    Dtype,
    EvaluateConfig,
    ModelConfig,
    Precision,
    RunConfig,
    TargetsConfig,
    TrainerConfig,
)

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[str, list[dict[str, Any]]], str]:
    """Writes rows as a jsonl file and returns its path."""

    def write(name: str, content: list[dict[str, Any]]) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return str(path)

    return write


def tiny_config(out: Path, **parts: Any) -> RunConfig:
    """The demo cut down: two targets, few rows, few steps; keywords change parts of it."""
    base: dict[str, Any] = {
        "name": "tiny",
        "model": ModelConfig(path="builtin:demo-opt", dtype=Dtype.float32),
        "targets": TargetsConfig(modules=["q_proj", "v_proj"]),
        "adapter": LoRAConfig(rank=4, lr=4e-3),
        "data": DataConfig(
            path="builtin:train", eval_path="builtin:dev", test_path="builtin:test",
            limit=32, eval_limit=6, max_length=64,
        ),
        "trainer": TrainerConfig(steps=5, batch_size=4, precision=Precision.fp32, threads=1),
        "evaluate": EvaluateConfig(max_new_tokens=3, generate_limit=4),
        "compare": CompareConfig(lr_points=2, rungs=1),
        "out": str(out),
    }  # fmt: skip
    return RunConfig(**{**base, **parts})


@pytest.fixture
def tiny(tmp_path: Path) -> MakeConfig:
    """``tiny_config`` with a folder of the test's own."""
    return lambda **parts: tiny_config(**{"out": tmp_path / "out", **parts})
