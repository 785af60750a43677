"""Base models whose linear layers are stored in 4 or 8 bits (bitsandbytes' formats)."""
