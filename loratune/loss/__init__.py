"""The loss over supervised tokens, and how to get it from a causal language model."""
