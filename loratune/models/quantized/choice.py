"""Which layers of a base are quantized: all linear ones but the output head and those skipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loratune.adapters.config import LayerKind, LayerPlace, LayerShape
from loratune.errors import LoratuneError, ModelError, did_you_mean, raise_together
from loratune.models.architectures import names_module
from loratune.models.quantized.format import BLOCK, Quantization


def layers_to_quantize(model: Any, quantization: Quantization) -> list[str]:
    """Names of the layers of a model that are quantized.

    Raises:
        ModelError: naming every layer whose width the block size does not divide, and every name
            in ``skip`` that no layer has.
    """
    widths = {
        name: sizes[1] for name, module in model.named_modules() if (sizes := sizes_of(module))
    }
    head = model.get_output_embeddings()
    heads = [name for name in widths if model.get_submodule(name) is head]
    return _chosen(widths, heads, quantization)


def shapes_to_quantize(
    layers: Sequence[LayerShape], quantization: Quantization
) -> list[LayerShape]:
    """The same of an architecture's layers, before there is a model.

    Raises:
        ModelError: as ``layers_to_quantize``.
    """
    linear = [one for one in layers if one.kind in (LayerKind.linear, LayerKind.conv1d)]
    heads = [one.name for one in linear if one.place is LayerPlace.head]
    chosen = set(_chosen({one.name: one.in_features for one in linear}, heads, quantization))
    return [one for one in linear if one.name in chosen]


def _chosen(
    widths: Mapping[str, int], heads: Iterable[str], quantization: Quantization
) -> list[str]:
    unused = [w for w in quantization.skip if not any(names_module(w, n) for n in widths)]
    problems: list[LoratuneError] = [_no_layer(name, widths) for name in unused]
    skipped = {n for n in widths for wanted in quantization.skip if names_module(wanted, n)}
    chosen = [name for name in widths if name not in skipped and name not in set(heads)]
    wrong = {name: widths[name] for name in chosen if widths[name] % BLOCK}
    if wrong and quantization.is_4bit:
        problems.append(_wrong_width(wrong))
    raise_together(problems)
    return chosen


def sizes_of(module: Any) -> tuple[int, int] | None:
    """(out, in) of a plain linear layer, or of GPT-2's Conv1D."""
    from torch import Tensor, nn

    if type(module) is nn.Linear:
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D" and isinstance(module.weight, Tensor):
        in_features, out_features = module.weight.shape
        return out_features, in_features
    return None


def _no_layer(name: str, layers: Iterable[str]) -> ModelError:
    tails = {layer.rpartition(".")[2] for layer in layers}
    fix = did_you_mean(name, tails) or "name a linear layer of the model, or a suffix of its name"
    return ModelError(f"no linear layer is named '{name}'", where="model.quantize_skip", fix=fix)


def _wrong_width(widths: Mapping[str, int]) -> ModelError:
    name, width = next(iter(widths.items()))
    more = f" (and {len(widths) - 1} more)" if len(widths) > 1 else ""
    tails = sorted({name.rpartition(".")[2] for name in widths})
    return ModelError(
        f"'{name}'{more} reads {width} numbers, which blocks of {BLOCK} do not divide",
        where="model.quantize",
        fix=f"set model.quantize=int8, or model.quantize_skip=[{','.join(tails)}]",
    )


def base_bytes(
    layers: Sequence[LayerShape], numbers: int, quantization: Quantization, bytes_per_number: int
) -> int:
    """Bytes of a quantized base in memory.

    Args:
        layers: the base's.
        numbers: all of the base's, tied ones counted once.
        quantization: how.
        bytes_per_number: of what is not quantized.

    Raises:
        ModelError: as ``layers_to_quantize``.
    """
    chosen = shapes_to_quantize(layers, quantization)
    plain = numbers - sum(one.in_features * one.out_features for one in chosen)
    packed = sum(quantization.bytes_of(one.out_features, one.in_features) for one in chosen)
    return plain * bytes_per_number + packed
