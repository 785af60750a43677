"""Which of llama.cpp's graphs computes a model of transformers, and which settings it reads.

llama.cpp has one graph in C++ for each ``general.architecture``.  A setting of ``config.json`` that
the graph does not read must have its default, or the file would compute another model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loratune.errors import ModelError

_SIZES = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "rope_parameters", "layer_types", "hidden_act", "hidden_activation",
})  # fmt: skip
_WITHOUT_EFFECT = frozenset({
    "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "label2id", "max_window_layers", "model_type",
    "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type",
    "return_dict", "transformers_version", "use_cache", "_name_or_path",
})  # fmt: skip
"""Settings that change no logit of a forward pass; tokens are the tokenizer's affair."""


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's graphs.

    Attributes:
        name: ``general.architecture``.
        activation: what ``hidden_act`` or ``hidden_activation`` must be.
        interleaved: rotary pairs are neighbours there, halves of a head in transformers: rows of
            the query and key projections have to be reordered.
        norm_offset: what transformers adds to a norm's weight, and llama.cpp expects added.
        reads: settings beyond the sizes that are written into the file.
        window: every so many layers one attends to everything, the others to a sliding window.
    """

    name: str
    activation: str = "silu"
    interleaved: bool = False
    norm_offset: float = 0.0
    reads: frozenset[str] = frozenset()
    window: int | None = None


_GEMMA = "gelu_pytorch_tanh"
_GEMMA_READS = frozenset({
    "sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "_sliding_window_pattern",
})  # fmt: skip
_ARCHITECTURES = {
    "llama": Architecture(
        "llama", interleaved=True, reads=frozenset({"attention_bias", "mlp_bias"})
    ),
    "mistral": Architecture("llama", interleaved=True, reads=frozenset({"sliding_window"})),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", _GEMMA, norm_offset=1.0),
    "gemma2": Architecture("gemma2", _GEMMA, norm_offset=1.0, reads=_GEMMA_READS, window=2),
    "gemma3_text": Architecture(
        "gemma3", _GEMMA, norm_offset=1.0, reads=_GEMMA_READS - {"attn_logit_softcapping"}, window=6
    ),
}
"""A GGUF file names its graph, so here a model's type does decide."""


def architecture_of(config: Any, where: str) -> Architecture:
    """The graph that computes a model, or an error that names what it would compute otherwise.

    Args:
        config: as transformers understands it.
        where: named in errors.

    Raises:
        ModelError: an architecture, or a setting of it, that is not written right.
    """
    found = _ARCHITECTURES.get(config.model_type)
    if found is None:
        known = ", ".join(_ARCHITECTURES)
        raise ModelError(
            f"architecture '{config.model_type}' cannot be written as GGUF",
            where=where,
            fix=f"export format=merged; GGUF is written for {known}",
        )
    _check_activation(config, found, where)
    _check_defaults(config, found, where)
    for check in _CHECKS:
        problem = check(config, found)
        if problem:
            raise _not_expressed(problem, where)
    return found


def _check_activation(config: Any, architecture: Architecture, where: str) -> None:
    for key in ("hidden_act", "hidden_activation"):
        value = getattr(config, key, None)
        if value is not None and value != architecture.activation:
            raise _not_expressed(f"{key}={value}", where)


def _check_defaults(config: Any, architecture: Architecture, where: str) -> None:
    """Settings that are not written must be the class's defaults; others do not exist for it."""
    read = _SIZES | _WITHOUT_EFFECT | architecture.reads
    defaults, values = type(config)().to_dict(), config.to_dict()
    for key in sorted(defaults.keys() - read):
        if values.get(key) != defaults[key]:
            raise _not_expressed(f"{key}={values.get(key)}", where)
    if values.get("quantization_config"):
        raise _not_expressed("quantization_config", where)


def _layers_problem(config: Any, architecture: Architecture) -> str:
    """Which layers have a sliding window follows from llama.cpp's pattern, not from the file."""
    types = getattr(config, "layer_types", None)
    if types is None:
        return ""
    every = architecture.window
    expected = [
        "sliding_attention" if every and (layer + 1) % every else "full_attention"
        for layer in range(len(types))
    ]
    return "" if list(types) == expected else "the order of layer_types"


def _scale_problem(config: Any, architecture: Architecture) -> str:
    """llama.cpp takes Gemma's scale of attention from the number of layers."""
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is None:
        return ""
    largest = {"gemma2": 46, "gemma3": 62}[architecture.name]
    head = config.hidden_size / config.num_attention_heads
    expected = head if config.num_hidden_layers == largest else config.head_dim
    return "" if scalar == expected else f"query_pre_attn_scalar={scalar}"


def _tie_problem(config: Any, architecture: Architecture) -> str:
    has_head = architecture.name not in ("gemma", "gemma2")
    return "" if has_head or config.tie_word_embeddings else "tie_word_embeddings=False"


def _softcap_problem(config: Any, architecture: Architecture) -> str:
    """The graph of Gemma 2 soft-caps always: by 0 where the file says nothing."""
    keys = ("attn_logit_softcapping", "final_logit_softcapping")
    if architecture.name != "gemma2":
        return ""
    return next((f"{key}=None" for key in keys if not getattr(config, key)), "")


_CHECKS: tuple[Callable[[Any, Architecture], str], ...] = (
    _layers_problem,
    _scale_problem,
    _tie_problem,
    _softcap_problem,
)


def _not_expressed(what: str, where: str) -> ModelError:
    return ModelError(
        f"llama.cpp cannot compute a model with {what}", where=where, fix="export format=merged"
    )
