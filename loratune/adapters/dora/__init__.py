"""DoRA, LoRA with a trained length for every output."""
