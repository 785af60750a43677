"""What adapters add to a model: parameters, bytes, activations, published counts."""
