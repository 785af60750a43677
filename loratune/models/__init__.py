"""What a base model is: its folder, its weights, its layers, its fingerprint."""
