"""The parts of a model that read no text: towers for images, video or sound."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_TEXT = frozenset({"input_ids", "inputs_embeds"})


def tower_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Names, dot at the end, of the models inside the model that read no text."""
    named = model.named_modules()
    return tuple(f"{name}." for name, module in named if name and _is_tower(module))


def _is_tower(module: nn.Module) -> bool:
    reads = getattr(module, "input_modalities", None)
    if reads is None:  # not a model of transformers
        return False
    # Many towers do not say what they read, and are then said to read text.
    return "text" not in reads or not any(map(_takes_text, module.modules()))


def _takes_text(module: nn.Module) -> bool:
    return bool(_TEXT & inspect.signature(module.forward).parameters.keys())
