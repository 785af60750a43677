"""The typed configuration: what a recipe may say."""
