"""Which layers an adapter can do something for, seen in a forward pass with gradients.

An adapter on a layer adds to the layer's output.  That is lost where the model never calls the
layer (it reads the weight itself, or waits for an image), or where the output never reaches the
logits; and it is wrong where a layer that is a Linear by its type computes something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from loratune.adapters.kernels.blocks import weight_of
from loratune.errors import ModelError
from loratune.models.build import first_line
from loratune.models.positions import positions
from loratune.models.probes.shortened import FAILURES, short_copy
from loratune.models.probes.states import TOLERANCE, affordable_tokens

UNREACHED = "without effect on the loss"
OTHERWISE = "of another formula than x Wᵀ + bias"
_TOKENS = (269, 31)
"""Primes: no multiples of anything that a model could insist on; one is beyond usual windows."""
_STRENGTH = 0.01
"""Of the adapters that the pass is made with, relative to their layers' inputs and outputs."""
_PASSES = 3
"""Passes in training mode: a model may leave out blocks at random."""

_RESULTS: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


def unusable_layers(model: nn.Module) -> dict[str, str]:
    """Layers on which an adapter would have no effect, or a wrong one, and why.

    Run on a copy with one block of each kind, in fp32 and in training mode; once for a model.
    Every layer has an adapter of rank 1 there, so that a weight that is zero hides no other.

    Args:
        model: a transformers model; stays as it is.

    Raises:
        ModelError: if the model cannot compute a short row of text in training.
    """
    if model not in _RESULTS:
        _RESULTS[model] = _probe(model)
    return _RESULTS[model]


def _probe(model: nn.Module) -> dict[str, str]:
    short = short_copy(model)
    small = short.model.train()
    inside = dict(small.named_modules())
    layers = _layers(model)
    unread = [name for name in layers if name.startswith(short.emptied)]
    names = {name: short.name_of(name) for name in layers if name not in unread}
    names = {name: other for name, other in names.items() if other in inside}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        seen = _Seen(small, {name: inside[name] for name in names.values()})
        for _ in range(_PASSES):
            seen.look()
            if not seen.unusable():
                break
    unusable = seen.unusable()
    found = {name: unusable[other] for name, other in names.items() if other in unusable}
    return dict.fromkeys(unread, UNREACHED) | found


def _layers(model: nn.Module) -> list[str]:
    """Every module that holds a weight matrix."""
    weights = {name: m._parameters.get("weight") for name, m in model.named_modules()}
    return [name for name, weight in weights.items() if weight is not None and weight.dim() == 2]


class _Seen:
    """What some passes showed of a model's layers."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._model, self._layers = model, layers
        self._device = next(model.parameters()).device
        self._otherwise: set[str] = set()
        self._strengths = {
            name: torch.tensor(_STRENGTH, device=self._device, requires_grad=True)
            for name in layers
        }

    def unusable(self) -> dict[str, str]:
        """Layer to reason, as far as it was looked."""
        gradients = {name: strength.grad for name, strength in self._strengths.items()}
        reasons = {name: UNREACHED for name, grad in gradients.items() if grad is None or not grad}
        return reasons | dict.fromkeys(self._otherwise, OTHERWISE)

    def look(self) -> None:
        """One pass forward and backward over a row."""
        # Half of the positions: some models begin to count behind the padding's.
        room = (positions(self._model) or 2 * _TOKENS[0]) // 2
        room = min(room, affordable_tokens(self._model))
        longer, shorter = (min(length, room - 1 + room % 2) for length in _TOKENS)
        try:
            self._pass(longer)
        except torch.OutOfMemoryError:
            raise
        except FAILURES:  # a table of positions that the config does not tell of
            with _failures_told(shorter):
                self._pass(shorter)

    def _pass(self, length: int) -> None:
        words = self._model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        ids = (3 + torch.arange(length, device=self._device))[None] % words
        with self._adapted(), torch.enable_grad():
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
            torch.autograd.backward(logits.float().square().mean())

    @contextmanager
    def _adapted(self) -> Iterator[None]:
        with ExitStack() as handles:
            for name, layer in self._layers.items():
                handles.callback(layer.register_forward_hook(self._hook(name)).remove)
            yield

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], object], Tensor | None]:
        strength = self._strengths[name]

        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: object) -> Tensor | None:
            if not isinstance(output, Tensor) or _computes_otherwise(layer, inputs, output):
                self._otherwise.add(name)
                return None
            x = _states(inputs, output).float()
            narrow = x @ torch.randn(x.shape[-1], 1, device=x.device)
            wide = torch.randn(output.shape[-1], device=x.device)
            return output + (strength * narrow * wide).to(output.dtype)

        return add


def _states(inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A layer's input; a lookup's, which are ids, stand for its output."""
    x = inputs[0] if inputs else None
    fits = isinstance(x, Tensor) and x.is_floating_point() and x.shape[:-1] == output.shape[:-1]
    return x if fits and x is not None else output.detach()


@torch.no_grad()
def _computes_otherwise(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> bool:
    """Whether a layer with a forward of its own is a Linear in name only."""
    is_plain = not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward
    if is_plain or not inputs:
        return False
    assert isinstance(layer, nn.Linear)
    plain = functional.linear(inputs[0], weight_of(layer, inputs[0].dtype), layer.bias)
    if plain.shape != output.shape:
        return True
    return float((plain - output).abs().max()) > TOLERANCE * float(plain.abs().max())


@contextmanager
def _failures_told(length: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise ModelError(
            f"the model cannot be trained on a row of {length} tokens of text: {first_line(error)}",
            where="model.path",
            fix="choose a model that reads rows of any length from their ids alone",
        ) from error
