"""How fast this machine is on the recipe's own layers: a few blocks, random weights, seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loratune.config.schema import RunConfig
from loratune.counting.activations import block_count, few_blocks, without_other_blocks
from loratune.loss.supervised import supervised_loss
from loratune.models.architectures import Architecture
from loratune.models.probes.layers import unusable_layers
from loratune.plan.compiling import Compiled, compile_trial
from loratune.plan.memory import hidden_size, vocabulary
from loratune.plan.workload import MicroBatch
from loratune.surgery import wrap_model
from loratune.targets.patterns import block_of

OPERATIONS = 5e10
"""Multiply-adds that one calibrating pass may cost: seconds on a slow machine."""
_SMALL_HEAD = 8192
_ROWS = 64


@dataclass(frozen=True)
class Speed:
    """Seconds on this machine.

    Attributes:
        block: forward and backward of one block, per token; the mean of the kinds.
        head: loss and its gradient, per supervised token, over the whole vocabulary.
        tokens: how many tokens were run at once.
        compiled: a block as ``trainer.compile`` has it, where the recipe asks for it.
    """

    block: float
    head: float
    tokens: int
    compiled: Compiled | None = None


def calibrate(
    architecture: Architecture,
    config: RunConfig,
    batch: MicroBatch,
    dtype: torch.dtype,
    device: torch.device,
) -> Speed:
    """Time one adapted block of each kind and a slice of the head.

    Args:
        architecture: the base model.
        config: the recipe: targets and variant.
        batch: a usual micro-batch; a cut of it is run if it would take long.
        dtype: of the base.
        device: where the recipe would run.
    """
    sequences, length = _affordable(architecture, batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cut = replace(config.targets, layers=None)
        model = few_blocks(architecture)
        variant, unusable = without_other_blocks(model, cut, config.adapter), unusable_layers(model)
        model = model.to(dtype)
        blocks = block_count(model)
        wrap_model(model, variant, cut, seed=0, unusable=unusable, strict=False)
        model = model.to(device)
        words = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        ids = torch.randint(4, max(5, words), (sequences, length), device=device)
        backbone = model.base_model
        assert isinstance(backbone, torch.nn.Module)

        def step(tokens: Tensor = ids) -> None:
            hidden = backbone(input_ids=tokens, use_cache=False)[0]
            hidden.float().sum().backward()

        def timed(action: Callable[[], None]) -> float:
            return _timed(action, device)

        seconds, head_seconds = timed(step), timed(_head_step(architecture, dtype, device))
        tokens, compiled = sequences * length, None
        if config.trainer.compile:
            fast, compiling = compile_trial(backbone, step, ids, timed, seconds)
            compiled = Compiled(fast / blocks / tokens, compiling / blocks)
    scale = vocabulary(architecture) / min(vocabulary(architecture), _SMALL_HEAD)
    return Speed(seconds / blocks / tokens, head_seconds / _ROWS * scale, tokens, compiled)


def _head_step(
    architecture: Architecture, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    words, width = min(vocabulary(architecture), _SMALL_HEAD), hidden_size(architecture)
    head = torch.nn.Linear(width, words, bias=False, device=device, dtype=dtype)
    head.requires_grad_(False)
    hidden = torch.randn(_ROWS, width, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, words, (_ROWS,), device=device)

    def step() -> None:
        supervised_loss(hidden, head, targets).total.backward()  # type: ignore[no-untyped-call]

    return step


def _affordable(architecture: Architecture, batch: MicroBatch) -> tuple[int, int]:
    """Sequences and length of the trial, so that one pass stays within ``OPERATIONS``."""
    inside = [layer for layer in architecture.layers if block_of(layer.name) == 0]
    weights = sum(layer.in_features * layer.out_features for layer in inside) or 1
    most = max(16, int(OPERATIONS / (2 * weights)))
    sequences, longest = batch.rows_alone
    length = max(2, min(longest, most, 512))
    return max(1, min(sequences, most // length)), length


def _timed(action: Callable[[], None], device: torch.device) -> float:
    """The faster of two runs, after one that warms up."""
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
