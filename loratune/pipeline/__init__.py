"""Whole runs: every stage in order, the later stages by their own commands, several processes."""
