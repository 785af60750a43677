"""LoRA-FA, LoRA with A frozen."""
