"""LoRA+, LoRA with a faster B."""
