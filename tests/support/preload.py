"""What children would otherwise import one by one, imported once before the first fork."""

from __future__ import annotations

from functools import cache


@cache
def preload() -> None:
    """Import torch, transformers and loratune's stages; nothing is run, no thread is started."""
    import safetensors.torch
    import torch
    import transformers
    import transformers.models.opt.modeling_opt
    from hydra.core.global_hydra import GlobalHydra  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import loratune.cli.dispatch
    import loratune.cli.hydra_app
    import loratune.pipeline.commands
    import loratune.pipeline.run  # noqa: F401

    torch.set_num_threads(1)
    assert transformers.__version__ and safetensors.torch
