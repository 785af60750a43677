"""Adapter variants: a frozen layer plus a small trainable correction."""

from loratune.adapters.config import AdapterConfig, AdapterCount, Kernel, LayerKind, LayerShape
from loratune.adapters.registry import adapter_class, config_class, variant_names

__all__ = [
    "AdapterConfig",
    "AdapterCount",
    "Kernel",
    "LayerKind",
    "LayerShape",
    "adapter_class",
    "config_class",
    "variant_names",
]
