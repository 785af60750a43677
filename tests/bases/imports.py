"""What a trial's process needs, imported once by the server that its children are forked from."""

from __future__ import annotations

import importlib
import pkgutil

import peft  # noqa: F401
import torch.distributed  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import loratune

for module in pkgutil.walk_packages(loratune.__path__, "loratune."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
