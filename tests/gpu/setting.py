"""What the tests of the GPU share: the device, tiny models on it, rows, and bounds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from support.tiny_models import VOCABULARY, tiny_llama
from torch import Tensor, nn

from loratune.adapters.config import AdapterConfig, Kernel
from loratune.adapters.registry import config_class, variant_names
from loratune.config.schema import DataConfig, TargetsConfig, TrainerConfig
from loratune.data.arrangement import Arrangement
from loratune.data.encoded_rows import EncodedRow
from loratune.data.training_set import TrainingSet
from loratune.surgery import WrappedModel, wrap_model

NAME = os.environ.get("LORATUNE_GPU_TEST_DEVICE", "cuda")
"""``cpu`` tries the tests themselves where there is no GPU."""
DEVICE = torch.device(NAME)
IS_CUDA = DEVICE.type == "cuda"
VARIANTS = variant_names()
KERNELS = [Kernel.reference, Kernel.fused]
RANK = 8


def switches() -> list[tuple[str, dict[str, bool]]]:
    """Every variant as it is by default, and with each of its own switches turned over."""
    common = {item.name for item in fields(AdapterConfig)}
    found: list[tuple[str, dict[str, bool]]] = [(name, {}) for name in VARIANTS]
    for name in VARIANTS:
        config = config_class(name)()
        for item in fields(config):
            value = getattr(config, item.name)
            if item.name not in common and isinstance(value, bool):
                found.append((name, {item.name: not value}))
    return found


def model(**changes: Any) -> Any:
    """A Llama whose heads every attention kernel of a GPU can take."""
    settings = {
        "hidden_size": 128, "intermediate_size": 192, "num_key_value_heads": 4,
        "max_position_embeddings": 1024, "initializer_range": 0.05,
    }  # fmt: skip
    return tiny_llama(**(settings | changes))


def wrapped(
    variant: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = DEVICE,
    *,
    moved: bool = True,
    base: nn.Module | None = None,
    **settings: Any,
) -> WrappedModel:
    """An adapted model, alike on every device; ``moved`` fills what trains, as mid-training.

    In float64 the adapter is too, so that it can be an oracle.
    """
    built = (model() if base is None else base).to(dtype).to(device)
    config = config_class(variant)(rank=RANK, **settings)
    made = wrap_model(built, config, TargetsConfig(modules="all-linear"), seed=0)
    if dtype is torch.float64:
        made.model.double()
    if moved:
        generator = torch.Generator().manual_seed(1)
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.data.copy_(noise)
    made.model.train()
    return made


def rows(count: int = 32, shortest: int = 20, longest: int = 60) -> list[EncodedRow]:
    """Rows of unlike length whose last two thirds are supervised; all begin with 8 tokens."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randint(3, VOCABULARY, (8,), generator=generator).tolist()
    made = []
    for number in range(count):
        length = shortest + (number * 7) % (longest - shortest + 1)
        own = torch.randint(3, VOCABULARY, (length - 8,), generator=generator).tolist()
        ids = [*common, *own]
        made.append(EncodedRow(ids, ((length // 3, length),), length // 3, f"rows:{number + 1}"))
    return made


def training_set(
    trainer: TrainerConfig, made: Sequence[EncodedRow] | None = None, **data: Any
) -> TrainingSet:
    """The rows in the order of a training, packed or sharing what they begin with if asked."""
    config = DataConfig(**data)
    packed = config.max_length if config.packing else 0
    share = "always" if config.share_prefixes is True else "never"
    arrangement = Arrangement(1, packed, share)
    return TrainingSet.from_config(made or rows(), arrangement, config, trainer)


def distance(got: Tensor, exact: Tensor) -> float:
    """‖got - exact‖ / ‖exact‖, in double precision on the CPU."""
    a, b = got.detach().cpu().double(), exact.detach().cpu().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))
