"""Choose micro-batch, gradient checkpointing and length so that a run fits into memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from loratune.config.convert import flatten, to_plain
from loratune.config.schema import RunConfig
from loratune.errors import ConfigError
from loratune.plan.memory import ERROR_BAR
from loratune.plan.workload import Rows, Workload, divided, read_workload_rows, workload
from loratune.units import byte_size, parse_bytes

if TYPE_CHECKING:
    from loratune.plan.model_checks import CheckedModel
    from loratune.plan.setting import Setting

_SHARES = ("99%", "95%")


def parse_size(text: str) -> int:
    """``24GB``, ``512MiB`` or plain bytes.

    Raises:
        ConfigError: if it is not a size above 0.
    """
    size = parse_bytes(text)
    if size is None:
        raise ConfigError(f"'{text}' is not a size", where="fit", fix="use fit=24GB or fit=900MiB")
    if size < 1:
        raise ConfigError(f"'{text}' allows nothing", where="fit", fix="use fit=24GB")
    return size


def fitted(
    config: RunConfig,
    rows: Rows,
    work: Workload,
    setting: Setting,
    model: CheckedModel,
    limit: int,
) -> tuple[RunConfig, Rows, Workload, tuple[str, ...]]:
    """The recipe changed as little as fits, with the overrides that change it so.

    Smaller micro-batches with more accumulation come first: they change no result.  Then blocks
    recompute their activations, a third more time.  Then the longest rows are cut.

    Args:
        config: the recipe.
        rows: its rows.
        work: its batches.
        setting: what decides its memory.
        model: what its model allows.
        limit: bytes, the error bar included.

    Raises:
        ConfigError: if nothing fits.
    """
    memories = []
    for candidate in _candidates(config, work, recomputes=model.recomputes):
        read = rows if candidate.data == config.data else read_workload_rows(candidate)
        candidate_work = workload(candidate, read, model.arrangement)
        memory = setting.memory(candidate, candidate_work)
        if memory.peak * (1 + ERROR_BAR) <= limit:
            return candidate, read, candidate_work, _overrides(config, candidate)
        memories.append(memory)
    smallest = min(memories, key=lambda memory: memory.peak)
    need = smallest.peak * (1 + ERROR_BAR)
    fix = "use a smaller base, or model.dtype=bfloat16 if it is loaded in fp32"
    if smallest.fixed * (1 + ERROR_BAR) < limit:
        fix = "lower data.max_length further"
    cause = f"nothing fits into {byte_size(limit)}: at least {byte_size(need)} are needed"
    raise ConfigError(cause, where="fit", fix=fix)


def _candidates(config: RunConfig, work: Workload, *, recomputes: bool) -> Iterator[RunConfig]:
    """Recipes with the same rows per step, the least changed first."""
    for length in _lengths(config, work):
        data = replace(config.data, max_length=length)
        for recompute in sorted({config.trainer.gradient_checkpointing, recomputes}):
            for size, accumulation in divided(config.trainer):
                trainer = replace(
                    config.trainer,
                    batch_size=size,
                    grad_accum_steps=accumulation,
                    gradient_checkpointing=recompute,
                )
                yield replace(config, data=data, trainer=trainer)


def _lengths(config: RunConfig, work: Workload) -> list[int]:
    """The recipe's own length, then those that keep fewer rows whole."""
    own = config.data.max_length
    keep = work.report.train.max_length_to_keep if work.report and work.report.train else {}
    shorter = [keep[share] for share in _SHARES if keep.get(share, own) < own]
    return list(dict.fromkeys([own, *sorted(shorter, reverse=True)]))


def _overrides(before: RunConfig, after: RunConfig) -> tuple[str, ...]:
    """The words that turn one recipe into the other, for the command line."""
    old, new = flatten(to_plain(before)), flatten(to_plain(after))
    return tuple(f"{key}={str(new[key]).lower()}" for key in new if new[key] != old[key])
