"""Tensors that stack a layer of every expert, as layers that an adapter can be put around.

Such a tensor is a parameter of a module that computes with all experts at once.  An adapter takes
the parameter's place; while the module computes, it finds W + ΔW there, a plain tensor.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from loratune.adapters.base import Adapter


class StackedWeight(nn.Module):
    """One parameter of a module, (experts, out, in) or (experts, in, out), as a layer."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class _Swap:
    """Hooks that show a module W + ΔW under the parameter's name while it computes."""

    def __init__(self, owner: nn.Module, key: str, adapter: Adapter) -> None:
        self._key, self._adapter = key, adapter
        names = list(owner._parameters)
        self.following = names[names.index(key) + 1 :]
        self._handles = [
            owner.register_forward_pre_hook(self._show),
            owner.register_forward_hook(self._hide, always_call=True),
        ]

    def _show(self, owner: nn.Module, inputs: Any) -> None:
        # An attribute of the object itself is found before its parameters and submodules.
        vars(owner)[self._key] = self._adapter(self._adapter.weight)

    def _hide(self, owner: nn.Module, inputs: Any, output: Any) -> None:
        vars(owner).pop(self._key, None)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def put_adapter(owner: nn.Module, key: str, adapter: Adapter) -> None:
    """Put an adapter in the place of a parameter, whose layer it is around."""
    swap = _Swap(owner, key, adapter)
    del owner._parameters[key]
    owner.add_module(key, adapter)
    vars(adapter)["swap"] = swap


def put_parameter(owner: nn.Module, key: str, layer: nn.Module) -> None:
    """Take an adapter away again; the parameter of ``layer`` has its place."""
    adapter = owner._modules.pop(key)
    assert isinstance(adapter, Adapter)
    swap: _Swap = vars(adapter).pop("swap")
    swap.remove()
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    owner.register_parameter(key, weight)
    for name in swap.following:  # back into the order in which the module has them
        if name in owner._parameters:
            owner._parameters[name] = owner._parameters.pop(name)
