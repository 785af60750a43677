"""loratune: fine-tune causal language models with LoRA, LoRA-FA, LoRA+ and VeRA."""

__version__ = "0.1.0"
