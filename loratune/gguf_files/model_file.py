"""Base + adapter as one GGUF file, merged tensor by tensor on the way into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

from loratune.config.schema import GgufDtype
from loratune.data.tokenizing import Tokenizer
from loratune.errors import ModelError
from loratune.gguf_files.architectures import architecture_of
from loratune.gguf_files.hyperparameters import add_hyperparameters
from loratune.gguf_files.numbers import FILE_TYPES, stored_type
from loratune.gguf_files.rope import rope_of
from loratune.gguf_files.streaming import PlannedTensor, write_tensors
from loratune.gguf_files.tensors import ROPE_FACTORS, TensorNames
from loratune.gguf_files.tokenizer import add_tokenizer, read_tokenizer
from loratune.merging.plan import MergePlan
from loratune.merging.weight import ModuleProof
from loratune.models.weights import TensorEntry, mapped


@dataclass
class WrittenGguf:
    """What was written.

    Attributes:
        architecture: llama.cpp's name of the graph.
        tokenizer: its kind there, and the pre-tokenizer of bytes.
        types: number format to how many tensors are stored in it.
        proofs: of every merged module, before rounding to the file's format.
        notes: what llama.cpp does otherwise.
    """

    architecture: str
    tokenizer: str
    types: dict[str, int] = field(default_factory=dict)
    proofs: list[ModuleProof] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_model(
    plan: MergePlan,
    tokenizer: Tokenizer,
    path: Path,
    dtype: GgufDtype,
    *,
    stops: Sequence[int],
    template: str | None,
) -> WrittenGguf:
    """Write a merge as GGUF; sums are made in fp32 and rounded once, to the file's format.

    Args:
        plan: a merge into fp32.
        tokenizer: of the merged model.
        path: the file, which must not exist.
        dtype: number format of its matrices.
        stops: every id that ends an answer, the one that training taught first.
        template: the chat template of training, if there was one.

    Raises:
        ModelError: if llama.cpp would compute or tokenize something else.
        MergeError: if a module does not prove itself.
    """
    offline, where = plan.offline[0], str(plan.base_folder)
    _require_plain(plan)
    config = offline.config
    architecture = architecture_of(config, where)
    rope, words = rope_of(config, where), read_tokenizer(tokenizer, offline.rows, where)
    written = WrittenGguf(architecture.name, f"{words.model} {words.pre}".strip())
    writer = GGUFWriter(None, architecture.name)
    writer.add_type("model")
    writer.add_file_type(FILE_TYPES[dtype])
    add_hyperparameters(writer, config, architecture, rope, offline.rows)
    left_out = add_tokenizer(writer, words, tokenizer, stops, template)
    names = TensorNames(config, architecture, where)
    tensors = [*_tensors(plan, names, dtype, written.proofs), *_rope_factors(rope.factors)]
    for one in tensors:
        written.types[one.kind.name] = written.types.get(one.kind.name, 0) + 1
    written.notes += [*words.notes, *_stop_notes(tokenizer, left_out)]
    write_tensors(writer, path, tensors)
    return written


def _require_plain(plan: MergePlan) -> None:
    """Check that the base's files hold the model's parameters as they are."""
    if plan.converted:
        raise ModelError(
            "transformers converts this base's tensors on loading: GGUF is not written for it",
            where=next(iter(plan.converted)),
            fix="export format=merged",
        )


def _stop_notes(tokenizer: Tokenizer, left_out: Sequence[int]) -> list[str]:
    names = tokenizer.convert_ids_to_tokens(list(left_out))
    return [
        f"GGUF has no place for the end token {name}: stop there in the client" for name in names
    ]


def _rope_factors(factors: Tensor | None) -> list[PlannedTensor]:
    if factors is None:
        return []
    kind = GGMLQuantizationType.F32
    return [PlannedTensor(ROPE_FACTORS, tuple(factors.shape), kind, lambda: factors)]


def _tensors(
    plan: MergePlan, names: TensorNames, dtype: GgufDtype, proofs: list[ModuleProof]
) -> Iterator[PlannedTensor]:
    """Every parameter of the merged model once, in the order of the base's files."""
    done: set[str] = set()
    for entry in (one for shard in plan.out_entries(plan.base_folder).values() for one in shard):
        parameter = plan.parameter_of(entry.name)
        if parameter is None:
            continue  # transformers does not read it either
        name = names.name(parameter)
        if name in done:
            continue
        done.add(name)
        value = partial(_value, plan, names, parameter, entry, proofs)
        yield PlannedTensor(name, entry.shape, stored_type(entry.shape, dtype), value)


def _value(
    plan: MergePlan,
    names: TensorNames,
    parameter: str,
    entry: TensorEntry,
    proofs: list[ModuleProof],
) -> Tensor:
    value, proved = plan.value(entry, mapped(plan.sources[entry.name].file))
    proofs += proved
    return names.value(parameter, value.to(torch.float32))
