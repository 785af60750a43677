"""Which layers of a model a recipe means."""
