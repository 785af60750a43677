"""The recipe files: read, checked and listed before Hydra composes them."""
