"""OFT, a layer's inputs rotated block by block."""
