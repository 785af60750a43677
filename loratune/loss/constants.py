"""Constants of the loss, in a module that does not import torch."""

IGNORED = -100
"""Label of a token that is not supervised (torch's ``ignore_index``)."""
CHUNK_LOGITS = 1 << 24
"""Logits alive at one time: 64 MiB in fp32."""
