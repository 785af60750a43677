"""What the tool relies on about a model, measured on the model itself."""
