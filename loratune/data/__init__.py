"""Rows in, batches out: reading, recognising, encoding, splitting, batching.

    sources → reading → formats (templates, chat) → encode (tokenizing) → prepare
    batches (which rows in which step), packing, collate (tensors)

Importing this package imports neither torch nor transformers.
"""
