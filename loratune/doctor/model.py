"""What training relies on about one base model, measured on its shapes: no weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from torch import nn

from loratune.adapters.registry import config_class
from loratune.config.schema import DataConfig, ModelConfig, RunConfig, TargetsConfig
from loratune.data.arrangement import arrange, check_single_rows
from loratune.data.encoded_rows import EncodedRow
from loratune.doctor.finding import Finding, Status, examine
from loratune.errors import ConfigError
from loratune.models.architectures import Architecture
from loratune.models.build import outline
from loratune.models.measure import find_architecture
from loratune.models.positions import positions
from loratune.models.probes.batched_generation import probe_batched_generation
from loratune.targets.find import find_targets
from loratune.training.forward import checkpoint_activations

_LONGEST = 512
"""Tokens of the rows that the model is tried on; fewer where it has fewer positions."""
_TOKENS = range(3, 259)


def check_model(path: str) -> Iterator[Finding]:
    """One finding for each thing that ``plan`` and ``train`` look at.

    Args:
        path: a model folder or a hub id.
    """
    architecture: list[Architecture] = []

    def measure() -> str:
        architecture.append(find_architecture(ModelConfig(path=path)))
        return _size(architecture[0])

    found = examine("model", measure, "check model.path")
    yield found
    if found.status is Status.ok:
        yield from _checks(path, architecture[0])


def _checks(path: str, architecture: Architecture) -> Iterator[Finding]:
    model = outline(architecture.numbers)
    longest = min(positions(model) or _LONGEST, _LONGEST)
    config = RunConfig(
        model=ModelConfig(path=path),
        targets=TargetsConfig(modules="all_linear"),
        adapter=config_class("lora")(),
    )
    yield examine("all_linear", partial(_targets, config, architecture), "choose another model")
    causal = examine("causal", partial(_causal, config, model, longest), "choose another model")
    yield causal
    if causal.status is Status.fail:
        return
    ways = {
        "packing": DataConfig(max_length=longest, packing=True),
        "shared beginnings": DataConfig(max_length=longest, share_prefixes=True),
    }
    for name, data in ways.items():
        yield _if_able(name, partial(_together, replace(config, data=data), model, longest))
    yield _if_able("recomputing", partial(_recomputes, model))
    yield Finding("generation", Status.ok, _generation(model, longest))


def _if_able(name: str, look: Callable[[], str]) -> Finding:
    """A finding about something that training does without where the model does not allow it."""
    try:
        return Finding(name, Status.ok, look())
    except ConfigError as error:
        return Finding(name, Status.warn, error.cause, error.fix)


def _size(architecture: Architecture) -> str:
    experts = sum(architecture.stacked_experts.values())
    share = f", {experts / architecture.base_parameters:.0%} in experts" if experts else ""
    return f"{architecture.family}, {architecture.base_parameters:,} parameters{share}"


def _targets(config: RunConfig, architecture: Architecture) -> str:
    match = find_targets(
        architecture.layers,
        config.targets,
        config.adapter,
        family=architecture.family,
        others=architecture.other_types,
        stacked=architecture.stacked_experts,
        unusable=architecture.unusable,
        base_parameters=architecture.base_parameters,
    )
    return "; ".join([f"{len(match.shapes)} layers", *match.notices])


def _causal(config: RunConfig, model: nn.Module, longest: int) -> str:
    """Later tokens and padding change nothing: with rows of one batch, then filled up ones."""
    check_single_rows(_in_batches_of(1, config), model, longest, _TOKENS)
    try:
        check_single_rows(config, model, longest, _TOKENS)
    except ConfigError as error:
        return f"no token sees a later one; {error.cause}: batches of one row only"
    return f"no token sees a later one, nor the padding (rows of {longest} tokens)"


def _in_batches_of(size: int, config: RunConfig) -> RunConfig:
    return replace(
        config,
        trainer=replace(config.trainer, batch_size=size),
        evaluate=replace(config.evaluate, batch_size=size),
    )


def _together(config: RunConfig, model: nn.Module, longest: int) -> str:
    ids = [_TOKENS[place % len(_TOKENS)] for place in range(longest)]
    arrange(_in_batches_of(1, config), model, 0, [EncodedRow(ids, ((1, longest),), 1, "")])
    return "computed as single rows are"


def _recomputes(model: nn.Module) -> str:
    checkpoint_activations(model)
    return "activations can be computed again (trainer.gradient_checkpointing)"


def _generation(model: nn.Module, longest: int) -> str:
    found = probe_batched_generation(model, min(longest, 128), _TOKENS)
    together = "several prompts at once" if found.padded else "prompts of one length at once"
    return together + (", what they begin with encoded once" if found.prefixed else "")
