"""What a recipe costs, before any weight is read."""
