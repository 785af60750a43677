"""VeRA, trained vectors around shared frozen matrices."""
