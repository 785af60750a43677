"""Corrections put into weights: computed, written and proved block by block."""
