"""What of a recipe decides its memory: model, adapter, device and number format."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

# Training's own imports: a plan runs in a process like training's, whose memory it counts.
import loratune.pipeline.run  # noqa: F401
from loratune.adapters.config import LayerShape
from loratune.config.schema import RunConfig, trained_tokens
from loratune.counting.activations import ActivationReport, measure_activations
from loratune.counting.parameters import VariantCount, count_in
from loratune.errors import ConfigError, LoratuneError
from loratune.models.architectures import Architecture
from loratune.models.devices import resolve_device, resolve_dtype
from loratune.models.dtypes import torch_dtype
from loratune.models.quantized.choice import base_bytes
from loratune.models.quantized.format import quantization_of
from loratune.models.source import is_hub_id, model_folder
from loratune.models.weights import stored_dtype, tensor_entries
from loratune.plan.memory import Memory, predict, resident_bytes
from loratune.plan.notices import match_targets
from loratune.plan.workload import Workload
from loratune.targets.patterns import block_of


@dataclass(frozen=True)
class Setting:
    """What of a recipe decides its memory.

    Attributes:
        architecture: the base model.
        count: what the adapter adds.
        adapted_blocks: blocks that have adapters.
        adapted_experts: stacked layers of experts that have adapters.
        activations: what autograd keeps per token.
        dtype: of the base as it is loaded.
        device: where the recipe would run.
        is_here: whether that device is in this machine.
        process: bytes of the process itself; 0 where the device has its own memory.
        stored: number format of the base's files, by its safetensors name.
        quantized_bytes: of the whole base, where its linear layers are quantized.
        notices: what a reader of the recipe's targets might not expect.
    """

    architecture: Architecture
    count: VariantCount
    adapted_blocks: int
    adapted_experts: tuple[LayerShape, ...]
    activations: ActivationReport
    dtype: torch.dtype
    device: torch.device
    is_here: bool
    process: int
    stored: str
    quantized_bytes: int | None = None
    notices: tuple[str, ...] = ()

    @property
    def bytes_per_weight(self) -> int:
        """Of the base as it is loaded."""
        return int(self.dtype.itemsize)

    def memory(self, config: RunConfig, work: Workload) -> Memory:
        """The peak of this recipe's training."""
        return predict(
            self.architecture,
            self.count,
            self.activations,
            work.largest,
            bytes_per_weight=self.bytes_per_weight,
            weights=self.quantized_bytes,
            adapted_blocks=self.adapted_blocks,
            adapted_experts=self.adapted_experts,
            gradient_checkpointing=config.trainer.gradient_checkpointing,
            process=self.process,
        )


def find_setting(config: RunConfig, architecture: Architecture, tokens: int) -> Setting:
    """What decides the recipe's memory; builds one block of each kind with random weights.

    Args:
        config: the recipe.
        architecture: the base model.
        tokens: length of the sequence that activations are measured on.

    Raises:
        LoratuneError: targets that match nothing, or a device that is not there.
    """
    matched = match_targets(config, architecture)
    quantization = quantization_of(config.model)
    saved, rows = config.targets.modules_to_save, len(trained_tokens(config))
    stored = _stored_dtype(config)
    device, dtype, is_here = _device_and_dtype(config, stored)
    measured = measure_activations(
        architecture, config.targets, config.adapter, tokens=tokens, dtype=dtype
    )
    gc.collect()
    return Setting(
        architecture=architecture,
        count=count_in(architecture, matched.shapes, config.adapter, saved, tokens=rows),
        adapted_blocks=len({block_of(shape.name) for shape in matched.shapes} - {None}),
        adapted_experts=tuple(shape for shape in matched.shapes if shape.is_stacked),
        activations=measured,
        dtype=dtype,
        device=device,
        is_here=is_here,
        process=resident_bytes() if device.type == "cpu" else 0,
        stored=stored,
        quantized_bytes=None
        if quantization is None
        else base_bytes(
            architecture.layers, architecture.base_parameters, quantization, dtype.itemsize
        ),
        notices=matched.notices,
    )


def _stored_dtype(config: RunConfig) -> str:
    """Number format of the base's files, from their headers; bf16 where they are not here."""
    if is_hub_id(config.model.path):
        return "BF16"
    try:
        entries = tensor_entries(model_folder(config.model.path, config.model.revision))
    except LoratuneError:
        return "BF16"
    return stored_dtype(entries.values())


def _device_and_dtype(config: RunConfig, stored: str) -> tuple[torch.device, torch.dtype, bool]:
    """Where the recipe would run, and whether that is here."""
    try:
        device, is_here = resolve_device(config.model.device), True
    except ConfigError:
        if not config.model.device.startswith("cuda"):
            raise
        device, is_here = torch.device("cuda"), False
    precision, in_files = config.trainer.precision, torch_dtype(stored)
    return device, resolve_dtype(config.model.dtype, precision, device, in_files), is_here
