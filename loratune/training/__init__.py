"""The parts of the training loop: one step, its state, its guards, its records."""
