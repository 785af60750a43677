"""A tiny random model of any causal-LM type that transformers has, as a folder with a tokenizer.

The type's own default config is taken, with small numbers in the place of its sizes (sizes.yaml):
two blocks or one of each kind, windows shorter than the rows, no dropout.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

import loratune

SIZES = Path(__file__).with_name("sizes.yaml")
TOKENIZER = Path(loratune.__file__).parent / "assets" / "demo-opt"
_DROPOUT = (
    "dropout", "pdrop", "layerdrop", "dropout_prob", "dropout_rate", "dropout_p",
    "jitter_noise", "jitter_eps",
)  # fmt: skip


def all_types() -> list[str]:
    """Every type of transformers' causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def multimodal_types() -> list[str]:
    """Every type of transformers' models that write text and read more than text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)


def write_base(name: str, folder: Path, *, multimodal: bool = False) -> None:
    """Write a model of type ``name``: config, weights, the embedded demo's tokenizer.

    Args:
        name: one of ``all_types``, or of ``multimodal_types``.
        folder: to write to.
        multimodal: the whole of a model that reads more than text.
    """
    torch.manual_seed(0)
    config = tiny_config(name)
    (_whole_model if multimodal else _model)(config).float().save_pretrained(folder)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)


def _model(config: Any) -> Any:
    """The causal language model of a config; all of the model if it would not load by itself."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model if type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING else _whole_model(config)


def _whole_model(config: Any) -> Any:
    from transformers import AutoModelForMultimodalLM

    return AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)


def tiny_config(name: str) -> Any:
    """The config of a type, with small numbers."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    return kind(**_with_own(name, small_numbers(kind().to_dict(), name)))


def small_numbers(defaults: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of a config that make it small; those of parts within it too."""
    numbers = _read("sizes")
    small: dict[str, Any] = {}
    for key, value in defaults.items():
        if isinstance(value, dict):
            if "model_type" in value:
                small[key] = _part(value, name)
        elif key in numbers and _takes_a_number(key, value):
            small[key] = numbers[key]
        elif key.endswith(_DROPOUT) and type(value) in (int, float):
            small[key] = 0.0
    kinds = list(dict.fromkeys(defaults.get("layer_types") or ()))
    if len(kinds) > 1:
        small |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    return small


def _part(defaults: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A config within another; some parts carry the type of the whole."""
    kind = defaults["model_type"]
    small = small_numbers(defaults, kind)
    return {**(small if kind == name else _with_own(kind, small)), "model_type": kind}


def _takes_a_number(key: str, value: Any) -> bool:
    if value is None:
        return key in _read("even_if_none")
    return key == "eos_token_id" or not isinstance(value, (list, tuple))


def _with_own(name: str, small: dict[str, Any]) -> dict[str, Any]:
    own = _read("types").get(name, {})
    if name in _read("decoders"):
        own = {"is_decoder": True, **own}
    return _merged(small, own)


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """``other`` over ``one``, and so in the dictionaries that both have."""
    inner = {
        key: _merged(one[key], value)
        for key, value in other.items()
        if isinstance(value, dict) and isinstance(one.get(key), dict)
    }
    return {**one, **other, **inner}


@functools.cache
def _read(part: str) -> Any:
    content = yaml.safe_load(SIZES.read_text(encoding="utf-8"))[part]
    if part == "sizes":
        return {key: size for size, keys in content.items() for key in _flat(keys)}
    return set(_flat(content)) if part in ("decoders", "even_if_none") else content


def _flat(items: Iterable[Any]) -> Iterator[str]:
    for item in items:
        yield from [item] if isinstance(item, str) else _flat(item)
