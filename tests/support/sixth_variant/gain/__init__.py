"""A stranger: a variant that no file of the package knows."""
