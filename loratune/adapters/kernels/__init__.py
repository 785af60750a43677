"""Fused adapter layers: the same mathematics as the readable reference, leaner and faster."""
