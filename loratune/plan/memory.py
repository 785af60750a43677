"""Peak memory of training by component, before any weight is read.

Weights, adapters, gradients and optimizer are exact counts.  What autograd keeps per token is
measured on one block of the architecture with random weights; the head's share follows from the
chunks in which the loss runs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from loratune.adapters.config import LayerShape
from loratune.counting.activations import ActivationReport
from loratune.counting.parameters import FP32_BYTES, VariantCount
from loratune.loss.constants import CHUNK_LOGITS
from loratune.models.architectures import Architecture
from loratune.plan.workload import MicroBatch
from loratune.targets.patterns import block_of

ERROR_BAR = 0.25
"""Stated relative error of the predicted peak; ``benchmarks/plan_memory.py`` measures it."""


@dataclass(frozen=True)
class Memory:
    """Bytes alive at the peak of a training step, by component.

    Attributes:
        process: Python, torch and libraries (host memory only).
        weights: the frozen base.
        adapters: trained and frozen numbers of the adapter, fp32.
        gradients: of the trained numbers, fp32.
        optimizer: AdamW's two moments, fp32.
        activations: what autograd keeps for one micro-batch.
        working: the larger of the head's chunk and the backward pass's temporaries.
    """

    process: int
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def fixed(self) -> int:
        """What no smaller micro-batch saves."""
        return self.process + self.weights + self.adapters + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """All of it."""
        return self.fixed + self.activations + self.working

    def components(self) -> dict[str, int]:
        """Name to bytes, in the order above."""
        return asdict(self)


def block_count(architecture: Architecture) -> int:
    """How many blocks the model has."""
    blocks = {block_of(layer.name) for layer in architecture.layers} - {None}
    return max(1, len(blocks))


def hidden_size(architecture: Architecture) -> int:
    """Width of the states between blocks."""
    numbers = architecture.numbers
    return int(numbers.get("hidden_size") or numbers.get("n_embd") or 0) or max(
        layer.out_features for layer in architecture.layers
    )


def vocabulary(architecture: Architecture) -> int:
    """Rows of the output head."""
    return int(architecture.numbers.get("vocab_size") or 0) or max(
        layer.in_features for layer in architecture.layers
    )


def predict(
    architecture: Architecture,
    count: VariantCount,
    measured: ActivationReport,
    batch: MicroBatch,
    *,
    bytes_per_weight: int,
    weights: int | None = None,
    adapted_blocks: int | None = None,
    adapted_experts: Sequence[LayerShape] = (),
    gradient_checkpointing: bool = False,
    process: int = 0,
) -> Memory:
    """The peak of a training step.

    Args:
        architecture: the base model.
        count: what the adapter adds.
        measured: bytes autograd keeps per token in one block, in the base's number format.
        batch: the largest micro-batch.
        bytes_per_weight: of the base as it is loaded.
        weights: bytes of the whole base, where it is quantized.
        adapted_blocks: blocks that have adapters; by default all.
        adapted_experts: stacked layers that have adapters.
        gradient_checkpointing: blocks keep their input only, and one is recomputed at a time.
        process: bytes of the process itself.
    """
    blocks, width = block_count(architecture), hidden_size(architecture)
    adapted = blocks if adapted_blocks is None else adapted_blocks
    state = width * bytes_per_weight
    if gradient_checkpointing:
        per_token = blocks * state + measured.base + measured.added
    else:
        per_token = blocks * measured.base + adapted * measured.added
    return Memory(
        process=process,
        weights=architecture.base_parameters * bytes_per_weight if weights is None else weights,
        adapters=(count.trainable + count.frozen) * FP32_BYTES,
        gradients=count.trainable * FP32_BYTES,
        optimizer=count.optimizer_bytes,
        activations=round(batch.tokens * (per_token + state))
        + _masks(batch, 1 if gradient_checkpointing else blocks) * bytes_per_weight
        + _adapted_weights(adapted_experts, gradient_checkpointing) * bytes_per_weight,
        working=max(
            _head(architecture, batch, bytes_per_weight),
            _temporaries(architecture, batch, bytes_per_weight)
            + 2 * max((x.parameters for x in adapted_experts), default=0) * bytes_per_weight,
        ),
    )


def _masks(batch: MicroBatch, blocks: int) -> int:
    """Numbers of the masks that attention keeps, one a block; single rows need none."""
    return blocks * batch.sequences * batch.length**2 if batch.is_masked else 0


def _adapted_weights(experts: Sequence[LayerShape], gradient_checkpointing: bool) -> int:
    """Numbers of W + ΔW that autograd keeps: of all stacked layers, or of one block's at a time."""
    blocks = Counter[int | None]()
    for shape in experts:
        blocks[block_of(shape.name)] += shape.parameters
    return max(blocks.values(), default=0) if gradient_checkpointing else blocks.total()


def _head(architecture: Architecture, batch: MicroBatch, bytes_per_weight: int) -> int:
    """One chunk of logits and log-probabilities, and the gradient of the hidden states."""
    words = vocabulary(architecture)
    logits = min(max(CHUNK_LOGITS, words), batch.supervised * words)
    # fp32: logits and log-probabilities; half precision: a widened copy besides.
    per_logit = 2 * FP32_BYTES if bytes_per_weight == FP32_BYTES else bytes_per_weight + 8
    states = 2 * batch.supervised * hidden_size(architecture) * bytes_per_weight
    return logits * per_logit + states


def _temporaries(architecture: Architecture, batch: MicroBatch, bytes_per_weight: int) -> int:
    """Gradients in flight inside one block: twice its widest layer, three of its states."""
    inside = [layer for layer in architecture.layers if block_of(layer.name) is not None]
    widest = max((max(x.in_features, x.out_features) for x in inside), default=0)
    return batch.tokens * bytes_per_weight * (2 * widest + 3 * hidden_size(architecture))


def resident_bytes() -> int:
    """Memory that this process holds now, its libraries included; 0 where nobody says."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes(device: torch.device) -> int | None:
    """Memory free on the device, or on this machine; ``None`` where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        [line] = [line for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        return None
    return int(line.split()[1]) * 1024
