"""Which tensors of a model's files become which parameters of the loaded model.

Transformers renames, fuses, splits and permutes what it reads (``conversion_mapping``), and layers
may share one tensor that is stored once.  The same rules are applied here to the names and shapes
of the files' headers, and are undone for tensors that have to be written back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loratune.errors import ModelError
from loratune.models.dtypes import torch_dtype
from loratune.models.weights import TensorEntry, read_one

if TYPE_CHECKING:
    from torch import Tensor, nn

Values = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class StoredGroup:
    """Stored tensors and the parameters that are made of them: usually one of each, as it is.

    Attributes:
        stored: names in the files, in the order in which transformers reads them.
        parameters: names in the model.
        conversion: how the one becomes the other; ``None`` where the tensor is the parameter.
        problem: why the parameters cannot be written back; empty if they can.
    """

    stored: tuple[str, ...]
    parameters: tuple[str, ...]
    conversion: _Conversion | None = None
    problem: str = ""

    def to_parameters(self, values: Values) -> dict[str, Tensor]:
        """The parameters, from the stored tensors by name."""
        if self.conversion is None:
            return {self.parameters[0]: values[self.stored[0]]}
        return self.conversion.to_parameters(values)

    def to_stored(self, values: Values) -> dict[str, Tensor]:
        """The stored tensors, from the parameters by name."""
        if self.conversion is None:
            return {self.stored[0]: values[self.parameters[0]]}
        return self.conversion.to_stored(values)


class StoredNames:
    """The files' names of a model's parameters.

    Attributes:
        shared: of a parameter that several modules share, name to all its names.
    """

    def __init__(self, model: nn.Module, entries: Mapping[str, TensorEntry]) -> None:
        """Read the rules off a plain (not yet wrapped) model, with or without data.

        Args:
            model: a model of transformers.
            entries: the tensors of its files.
        """
        self.shared = shared_names(model)
        self._aliases = _by_tensor(model.named_parameters(remove_duplicate=False))
        self._entries = entries
        self._reader = _Reader(model, entries)

    @property
    def groups(self) -> list[StoredGroup]:
        """Everything that is read, each group once."""
        return list({id(group): group for group in self._groups.values()}.values())

    @cached_property
    def _groups(self) -> dict[str, StoredGroup]:
        groups: dict[str, StoredGroup] = {}
        for group in self._reader.groups():
            for name in group.parameters:
                groups.setdefault(name, group)
        return groups

    def own(self, parameter: str) -> StoredGroup | None:
        """What is stored under a parameter's very own name, or ``None``."""
        return self._groups.get(parameter)

    def parameter_of(self, stored: str) -> str | None:
        """The parameter that a stored tensor becomes, the first where it becomes several."""
        return self._parameters.get(stored)

    @cached_property
    def _parameters(self) -> dict[str, str]:
        groups = self._groups.values()
        return {stored: group.parameters[0] for group in groups for stored in group.stored}

    def stored_as(self, parameter: str) -> tuple[str, StoredGroup] | None:
        """What a parameter is read from, and its name there: a tied one's is its partner's."""
        for name in (parameter, *self._aliases.get(parameter, ())):
            if name in self._groups:
                return name, self._groups[name]
        return None

    def problem_of(self, parameter: str, *, alone: bool = False) -> str:
        """Why a parameter cannot be written back into the files, or an empty string.

        Args:
            parameter: its name in the model.
            alone: it is to get a tensor of its own, although the model shares it.
        """
        found = self.stored_as(parameter)
        if found is None:
            return "no tensor of the files becomes it"
        if alone and found[1].conversion is not None and self.own(parameter) is None:
            return f"it shares {found[0]}, which is not stored as it is"
        return found[1].problem

    def read(self, parameter: str) -> Tensor:
        """A parameter's (or buffer's) value, from the files.

        Raises:
            ModelError: if they do not hold it.
        """
        found = self.stored_as(parameter)
        if found is None:
            raise ModelError(f"the base has no '{parameter}'", where="model.path")
        name, group = found
        stored = {one: read_one(self._entries[one]) for one in group.stored}
        return group.to_parameters(stored)[name]


def shared_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Of every parameter that several modules share, each name and all of them.

    A module that occurs in several places is one module, and its parameters are its own.
    """
    return _by_tensor(
        (f"{module}.{key}" if module else key, parameter)
        for module, one in model.named_modules()
        for key, parameter in one.named_parameters(recurse=False, remove_duplicate=False)
    )


def _by_tensor(named: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[str, ...]]:
    """Of every tensor with several names, each name and all of them."""
    names: dict[int, list[str]] = {}
    for name, tensor in named:
        names.setdefault(id(tensor), []).append(name)
    return {name: tuple(many) for many in names.values() if len(many) > 1 for name in many}


# -- transformers' rules -------------------------------------------------------------------


@dataclass(frozen=True)
class _Shapes:
    """What a conversion may ask of the model: its settings, and a parameter for its shape."""

    config: Any
    tensors: Values

    def get_parameter(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass
class _Collected:
    """The stored tensors that one conversion takes, by name, with the pattern each matched.

    ``renamed`` is each one's name after the plain renamings, which precede a conversion.
    """

    conversion: Any
    patterns: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)


class _Reader:
    """Applies transformers' rules of loading to names, as its own loader does."""

    def __init__(self, model: Any, entries: Mapping[str, TensorEntry]) -> None:
        self._state: dict[str, Tensor] = dict(model.state_dict())
        self._prefix = str(getattr(model, "base_model_prefix", ""))
        self._shapes = _Shapes(getattr(model, "config", None), self._state)
        self._entries = entries
        self._rules = _rules_of(model)

    def groups(self) -> list[StoredGroup]:
        """Every stored tensor that the model has a place for, with what it becomes."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

        renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self._rules if isinstance(rule, WeightConverter)]
        by_pattern = {p: rule for rule in converters for p in rule.source_patterns}
        plain: dict[str, str] = {}
        collected: dict[str, _Collected] = {}
        for stored in sorted(self._entries, key=dot_natural_key):
            renamed, name, pattern = self._name_of(stored, renamings, converters)
            if name not in self._state:
                continue  # a tower that the text model leaves out
            if pattern is None:
                plain.setdefault(name, stored)
            else:
                one = collected.setdefault(name, _Collected(by_pattern[pattern]))
                one.patterns[stored], one.renamed[stored] = pattern, renamed
        groups = [StoredGroup((stored,), (name,)) for name, stored in plain.items()]
        return groups + [self._converted(name, one) for name, one in collected.items()]

    def _name_of(
        self, stored: str, renamings: list[Any], converters: list[Any]
    ) -> tuple[str, str, str | None]:
        """A stored tensor's name after the renamings and in the end, and the pattern matched."""
        from transformers.core_model_loading import rename_source_key

        renamed, _ = rename_source_key(stored, renamings, [])
        converted, pattern = rename_source_key(renamed, [], converters)
        name = self._prefixed(converted)
        if name not in self._state and stored in self._state:
            return stored, self._prefixed(stored), None
        if name != converted:  # the name as it is converted has the model's prefix, or lacks it
            begin = f"{self._prefix}."
            added = name == begin + converted
            renamed = begin + renamed if added else renamed.removeprefix(begin)
        return renamed, name, pattern

    def _prefixed(self, name: str) -> str:
        """The name with the model's prefix put in front or taken away, where it is one then."""
        from transformers.core_model_loading import rename_source_key

        renamed: str = rename_source_key(name, [], [], self._prefix, self._state)[0]
        return renamed

    def _converted(self, first: str, collected: _Collected) -> StoredGroup:
        """A group that is converted; its rules are tried on empty tensors of the same shapes."""
        import torch

        stored = tuple(collected.patterns)
        conversion = _Conversion(first, collected, self._shapes)
        entries = [self._entries[name] for name in stored]
        empty = {
            entry.name: torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device="meta")
            for entry in entries
        }
        name = type(collected.conversion.operations[0]).__name__
        try:
            parameters = conversion.to_parameters(empty)
        except Exception as error:  # whatever an operation of transformers raises
            return StoredGroup(stored, (first,), conversion, f"{name} does not apply: {error}")
        if len({entry.dtype for entry in entries}) > 1:
            problem = "the tensors it is made of are stored in several number formats"
        else:
            problem = conversion.why_not_reversed(parameters, empty)
        return StoredGroup(stored, tuple(parameters), conversion, problem)


def _rules_of(model: Any) -> list[Any]:
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model)) if isinstance(model, PreTrainedModel) else []


class _Conversion:
    """One of transformers' conversions, forward as on loading and backward as on saving."""

    def __init__(self, first: str, collected: _Collected, shapes: _Shapes) -> None:
        self._first, self._collected, self._shapes = first, collected, shapes

    def to_parameters(self, values: Values) -> dict[str, Tensor]:
        rule = deepcopy(self._collected.conversion)
        for stored, pattern in self._collected.patterns.items():
            rule.add_tensor(self._first, stored, pattern, _given(values[stored]))
        return self._run(rule, self._first)

    def to_stored(self, values: Values) -> dict[str, Tensor]:
        rule = self._collected.conversion.reverse_transform()
        first: str | None = None
        for name in values:
            renamed, pattern = rule.rename_source_key(name)
            first = first or renamed
            rule.add_tensor(renamed, name, pattern, _given(values[name]))
        results = self._run(rule, str(first))
        return {stored: results[name] for stored, name in self._collected.renamed.items()}

    def why_not_reversed(self, parameters: Values, stored: Values) -> str:
        """Why the stored tensors cannot be made of the parameters again, judged by shapes."""
        kinds = ", ".join(type(op).__name__ for op in self._collected.conversion.operations)
        try:
            again = self.to_stored(parameters)
        except Exception as error:  # whatever an operation of transformers raises
            reason = str(error) or type(error).__name__
            return f"transformers cannot undo its conversion ({kinds}): {reason}"
        same = all(again[name].shape == tensor.shape for name, tensor in stored.items())
        return "" if same else f"transformers undoes its conversion ({kinds}) to other shapes"

    def _run(self, rule: Any, first: str) -> dict[str, Tensor]:
        results = rule.convert(first, model=self._shapes, config=self._shapes.config)
        return {name: v[0] if isinstance(v, list) else v for name, v in results.items()}


def _given(tensor: Tensor) -> Any:
    """A tensor in a form that a conversion takes: a function that reads it."""
    return lambda: tensor
