"""Find the layers to adapt in a model and swap them for adapters, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from loratune.adapters.base import Adapter, CopyParameter, LayerPlan, ReadParameter, data_device
from loratune.adapters.config import AdapterConfig, LayerShape
from loratune.adapters.kernels.blocks import blocks_of
from loratune.adapters.registry import adapter_class
from loratune.adapters.stacked import StackedWeight, put_adapter, put_parameter
from loratune.adapters.token_rows import TokenRows
from loratune.config.schema import TargetsConfig
from loratune.errors import ModelError
from loratune.models.architectures import names_module
from loratune.models.measure import count_numbers, layer_shapes, measure_model, stacked_experts
from loratune.models.quantized.adoption import adopt_layers
from loratune.models.stored_names import shared_names
from loratune.models.vocabulary import embedding_names
from loratune.targets.find import TargetMatch, alpha_for, find_targets, rank_for, targets_of

TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
"""What PEFT calls the rows of trained tokens; they are the rows, not differences."""


class SavedModule(nn.Module):
    """A module trained in full and stored with the adapter; the original is kept beside it.

    The copy trains in fp32; what flows in and out keeps the original's dtype.

    Attributes:
        original_module: the frozen module that was there before.
        trained_module: its trainable copy, which the model uses.
    """

    def __init__(self, module: nn.Module, copy: CopyParameter | None = None) -> None:
        super().__init__()
        self.original_module = module.requires_grad_(False)
        self.trained_module = _trainable_copy(module, copy)
        self.enabled = True

    def forward(self, *args: object, **kwargs: object) -> object:
        if not self.enabled:
            return self.original_module(*args, **kwargs)
        parameter = next(self.original_module.parameters())
        dtype = parameter.dtype
        if dtype is torch.float32 or torch.is_autocast_enabled(parameter.device.type):
            return self.trained_module(*args, **kwargs)
        raised = [_cast(argument, torch.float32) for argument in args]
        named = {name: _cast(argument, torch.float32) for name, argument in kwargs.items()}
        return _cast(self.trained_module(*raised, **named), dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The weight in use, where models read ``module.weight`` directly."""
        module = self.trained_module if self.enabled else self.original_module
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        return weight


def _cast(value: object, dtype: torch.dtype) -> object:
    """A floating tensor, or a tuple of them, in ``dtype``; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    return tuple(_cast(item, dtype) for item in value) if type(value) is tuple else value


def _trainable_copy(module: nn.Module, copy: CopyParameter | None) -> nn.Module:
    """A copy with its own fp32 parameters, so that small updates are not rounded away.

    Without ``copy``, parameters without data get whatever lies in memory.
    """
    copies = {id(one): copy(one) for one in module.parameters() if copy and one.is_meta}
    trained = deepcopy(module, copies).float()
    if copy is None and next(trained.parameters()).is_meta:
        trained = trained.to_empty(device="cpu")  # a base of names and shapes
    return trained.requires_grad_(True)


@dataclass(frozen=True)
class WrappedModel:
    """A model whose targets are adapters.

    Attributes:
        model: the model, changed in place.
        adapters: module name to adapter, in the model's order.
        saved_modules: module name to module trained in full.
        token_rows: name of an embedding to the rows of it that train.
        config: the adapter's settings.
        match: which patterns matched what.
    """

    model: nn.Module
    adapters: Mapping[str, Adapter]
    saved_modules: Mapping[str, SavedModule]
    config: AdapterConfig
    match: TargetMatch
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)


def wrap_model(
    model: nn.Module,
    config: AdapterConfig,
    targets: TargetsConfig,
    *,
    seed: int | None = 0,
    family: str | None = None,
    unusable: Mapping[str, str] | None = None,
    strict: bool = True,
    will_be_loaded: bool = False,
    tokens: Sequence[int] = (),
    read_original: Callable[[str], torch.Tensor] | None = None,
    read: ReadParameter | None = None,
    copy: CopyParameter | None = None,
) -> WrappedModel:
    """Freeze the model and swap its target layers for adapters, in place.

    Args:
        model: any module; a Hugging Face model's family is read from its config.
        config: the variant's settings.
        targets: which layers.
        seed: of the adapters' random start; ``None`` draws from torch's current state.
        family: architecture that the role words resolve for, by default ``model.config``'s.
        unusable: layer to why an adapter can do nothing for it, where that was looked at.
        strict: every listed pattern must match; else one match in all is enough.
        will_be_loaded: skip a costly start that loading an adapter will overwrite.
        tokens: ids whose rows of both embeddings train.
        read_original: gives a parameter as it was before a layer was quantized.
        read: gives the value of a parameter of a model whose parameters have no data yet.
        copy: gives a copy of such a parameter that trains, and has no data yet either.

    Raises:
        ModelError: if a pattern matches nothing, or a layer cannot be adapted.
    """
    adopt_layers(model)
    if family is None:
        family = getattr(getattr(model, "config", None), "model_type", None)
    targets = targets_of(config, targets, measure_model(model))
    others = {name: type(module).__name__ for name, module in model.named_modules() if name}
    match = find_targets(
        layer_shapes(model),
        targets,
        config,
        family,
        others=others,
        stacked=stacked_experts(model),
        unusable=unusable,
        base_parameters=count_numbers(model),
        strict=strict,
    )
    _check_overlap(match, targets)
    _check_quantized(model, match, config)
    ends = _ends_with_tokens(model, match, targets) if tokens else []
    model.requires_grad_(False)
    if seed is not None:
        torch.manual_seed(seed)
    plans = [
        replace(_plan(model, shape, config, read_original), read=read, copy=copy)
        for shape in match.shapes
    ]
    start = config.without_costly_init() if will_be_loaded else config
    adapters = adapter_class(config.variant).build(plans, start)
    for plan, adapter in zip(plans, adapters, strict=True):
        adapter.config = config
        adapter.train(plan.base_layer.training)
        _put(model, plan.shape, adapter)
    saved = {name: _save_module(model, name, copy) for name in _saved_names(model, targets)}
    named = {adapter.shape.name: adapter for adapter in adapters}
    return WrappedModel(model, named, saved, config, match, _put_rows(model, ends, tokens, read))


def _plan(
    model: nn.Module,
    shape: LayerShape,
    config: AdapterConfig,
    read: Callable[[str], torch.Tensor] | None,
) -> LayerPlan:
    rank, alpha = rank_for(shape.name, config), alpha_for(shape.name, config)
    layer = (
        StackedWeight(model.get_parameter(shape.name))
        if shape.is_stacked
        else model.get_submodule(shape.name)
    )
    has_original = read is not None and blocks_of(layer) is not None
    original = partial(original_weight, layer, shape, read) if read and has_original else None
    return LayerPlan(layer, shape, rank, alpha, original)


def original_weight(
    layer: nn.Module, shape: LayerShape, read: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """The weight (out, in) that a quantized layer was made of; ``read`` gives a parameter."""
    weight = read(shape.parameter)
    return weight.T if getattr(layer, "stored_input_first", False) else weight


def _put(model: nn.Module, shape: LayerShape, new: nn.Module) -> None:
    """Put an adapter in the place of a layer, or a layer back in its adapter's."""
    if not shape.is_stacked:
        model.set_submodule(shape.name, new)
        return
    owner, _, key = shape.name.rpartition(".")
    if isinstance(new, Adapter):
        put_adapter(model.get_submodule(owner), key, new)
    else:
        put_parameter(model.get_submodule(owner), key, new)


def _check_overlap(match: TargetMatch, targets: TargetsConfig) -> None:
    for wanted in targets.modules_to_save:
        for shape in match.shapes:
            if names_module(wanted, shape.name):
                raise ModelError(
                    f"'{wanted}' cannot both get an adapter and be trained in full",
                    where=shape.name,
                    fix="remove it from targets.modules or from targets.modules_to_save",
                )


def _check_quantized(model: nn.Module, match: TargetMatch, config: AdapterConfig) -> None:
    """Check that the variant can adapt every layer of the match whose weight is quantized."""
    reason = config.why_not_quantized()
    names = [] if not reason else [shape.name for shape in match.shapes if not shape.is_stacked]
    for name in names:
        if blocks_of(model.get_submodule(name)) is not None:
            raise ModelError(
                f"{config.variant} cannot adapt a quantized layer: {reason}",
                where=name,
                fix="choose another variant (adapter=...), or a base that is not quantized",
            )


def _ends_with_tokens(model: nn.Module, match: TargetMatch, targets: TargetsConfig) -> list[str]:
    """The embeddings that the rows of trained tokens belong to.

    Raises:
        ModelError: if the model has none, or one of them is adapted or trained in full.
    """
    ends = embedding_names(model)
    if not ends:
        cause = "the model does not say which module its input embedding is"
        raise ModelError(cause, where="targets.tokens", fix="remove it")
    for name in ends:
        if name in {shape.name for shape in match.shapes} or any(
            names_module(wanted, name) for wanted in targets.modules_to_save
        ):
            raise ModelError(
                f"'{name}' is trained otherwise already: single tokens of it cannot be",
                where="targets.tokens",
                fix="remove it and model.add_tokens (the rows of tokens that exist train with "
                "that layer), or leave the layer out of the targets",
            )
    return ends


def _put_rows(
    model: nn.Module, ends: Sequence[str], tokens: Sequence[int], read: ReadParameter | None
) -> dict[str, TokenRows]:
    """Put modules with trained rows in the embeddings' places; tied ones train the same rows."""
    modules = {name: model.get_submodule(name) for name in ends}
    rows: dict[int, nn.Parameter] = {}
    placed: dict[str, TokenRows] = {}
    for name, module in modules.items():
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        ids = torch.tensor(list(tokens), device=data_device(weight))
        placed[name] = TokenRows(module, ids, rows.get(id(weight)), read)
        rows[id(weight)] = placed[name].rows
        model.set_submodule(name, placed[name])
    return placed


def _saved_names(model: nn.Module, targets: TargetsConfig) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    saved: list[str] = []
    for wanted in targets.modules_to_save:
        matches = [name for name in names if names_module(wanted, name)]
        if not matches:
            raise ModelError(
                f"no module is named '{wanted}'",
                where="targets.modules_to_save",
                fix="name a module of the model, for example lm_head",
            )
        saved += matches
    return list(dict.fromkeys(saved))


def _save_module(model: nn.Module, name: str, copy: CopyParameter | None) -> SavedModule:
    if any(blocks_of(part) is not None for part in model.get_submodule(name).modules()):
        raise ModelError(
            f"'{name}' is quantized, and cannot be trained in full",
            where="targets.modules_to_save",
            fix=f"leave it as it is with model.quantize_skip=[{name.rpartition('.')[2]}]",
        )
    saved = SavedModule(model.get_submodule(name), copy)
    model.set_submodule(name, saved)
    return saved


@contextmanager
def disabled(wrapped: WrappedModel) -> Iterator[None]:
    """Inside the block the model behaves as its base; on exit the earlier state is back."""
    layers: list[Any] = [
        *wrapped.adapters.values(), *wrapped.saved_modules.values(), *wrapped.token_rows.values()
    ]  # fmt: skip
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def unwrap_model(wrapped: WrappedModel) -> nn.Module:
    """Put the original layers back, bit for bit, and return the frozen base model."""
    model = wrapped.model
    for adapter in wrapped.adapters.values():
        adapter.unmerge()
        _put(model, adapter.shape, adapter.base_layer)
    for name, saved in wrapped.saved_modules.items():
        model.set_submodule(name, saved.original_module)
    for name, rows in wrapped.token_rows.items():
        model.set_submodule(name, rows.original_module)
    return model


def merge_model(wrapped: WrappedModel) -> nn.Module:
    """Replace every adapter by the plain layer that holds W + ΔW; return the plain model.

    A weight that was tied to another module's gets its own copy, and the model's config says so:
    an adapter changes one of the two, never silently both.
    """
    model = wrapped.model
    parts, together = _parts_tied_weights(wrapped), _trained_together(wrapped)
    for adapter in wrapped.adapters.values():
        _put(model, adapter.shape, adapter.merged_layer())
    for name, rows in wrapped.token_rows.items():
        model.set_submodule(name, rows.merged_module())
    for first, *others in together:
        for other in others:
            model.get_submodule(other).weight = model.get_submodule(first).weight
    for name, saved in wrapped.saved_modules.items():
        dtype = next(saved.original_module.parameters()).dtype
        model.set_submodule(name, saved.trained_module.to(dtype).requires_grad_(False))
    if parts:
        _untie(model)
    return model


def _untie(model: Any) -> None:
    """Give every weight that the configuration tied its own copy, and say so there.

    A configuration ties all of them or none: those that no adapter changed part as well.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    for name in tied.keys() & shared_names(model).keys():
        module, _, key = name.rpartition(".")
        owner = model.get_submodule(module)
        copy = getattr(owner, key).detach().clone()
        owner.register_parameter(key, nn.Parameter(copy, requires_grad=False))
    model.config.tie_word_embeddings = False
    if tied:
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _parts_tied_weights(wrapped: WrappedModel) -> bool:
    """Whether weights that the configuration ties must part because one of them is changed."""
    if not getattr(getattr(wrapped.model, "config", None), "tie_word_embeddings", False):
        return False
    together = {name for group in _trained_together(wrapped) for name in group}
    changed = [
        f"{module}."
        for module in (*wrapped.adapters, *wrapped.saved_modules, *wrapped.token_rows)
        if module not in together
    ]
    return any(name.startswith(tuple(changed)) for name in shared_names(wrapped.model))


def _trained_together(wrapped: WrappedModel) -> list[list[str]]:
    """Groups of layers that train one weight, or rows, in place of what they shared."""
    groups: dict[int, list[str]] = {}
    for name, adapter in wrapped.adapters.items():
        if "weight" in (own := adapter.trained_parameters()):
            groups.setdefault(own["weight"].data_ptr(), []).append(name)
    for name, rows in wrapped.token_rows.items():
        groups.setdefault(rows.rows.data_ptr(), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def trained_values(wrapped: WrappedModel) -> dict[str, torch.Tensor]:
    """Every parameter and buffer that was trained in full, by its name in the plain model."""
    values: dict[str, torch.Tensor] = {}
    for name, adapter in wrapped.adapters.items():
        own = adapter.trained_parameters()
        values |= {f"{name}.{key}": value for key, value in own.items()}
    for name, saved in wrapped.saved_modules.items():
        own = saved.trained_module.state_dict()
        values |= {f"{name}.{key}": value.detach() for key, value in own.items()}
    for name, rows in wrapped.token_rows.items():
        values[f"{name}.weight"] = rows.whole_weight()
    return values


def adapter_state(wrapped: WrappedModel) -> dict[str, torch.Tensor]:
    """Every tensor of every adapter and saved module, frozen ones too, in PEFT's key names.

    One that several layers train together is there once, under the first one's name.
    """
    named: dict[torch.Tensor, str] = {}
    names = peft_names(wrapped)
    for name, adapter in wrapped.adapters.items():
        for suffix, tensor in adapter.peft_tensors().items():
            named.setdefault(tensor, f"base_model.model.{names[name]}.{suffix}")
        for key, tensor in adapter.shared_tensors().items():
            named.setdefault(tensor, key)
    for name, rows in wrapped.token_rows.items():
        named.setdefault(rows.rows, f"base_model.model.{name}.{TOKEN_ROWS}")
    state = {key: tensor.detach() for tensor, key in named.items()}
    for name, saved in wrapped.saved_modules.items():
        for suffix, tensor in saved.trained_module.state_dict().items():
            state[f"base_model.model.{name}.{suffix}"] = tensor.detach()
    return state


def peft_names(wrapped: WrappedModel) -> dict[str, str]:
    """Name of every adapted layer to its name in PEFT's file.

    PEFT wraps the module that has an adapted parameter, once more for each further parameter of
    it: the first one's adapter is the innermost.
    """
    names = {}
    outer: dict[str, int] = {}
    for name in reversed(list(wrapped.adapters)):
        if wrapped.adapters[name].shape.is_stacked:
            owner = name.rpartition(".")[0]
            names[name] = owner + ".base_layer" * outer.get(owner, 0)
            outer[owner] = outer.get(owner, 0) + 1
        else:
            names[name] = name
    return names
