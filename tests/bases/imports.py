"""What a trial's process needs, imported once by the server that its children are forked from."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil

import peft  # noqa: F401
import torch.distributed  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import loratune
from loratune.errors import ConfigError

for module in pkgutil.walk_packages(loratune.__path__, "loratune."):
    if not module.name.endswith("__main__"):
        with contextlib.suppress(ConfigError):  # it needs an extra that is not here
            importlib.import_module(module.name)
