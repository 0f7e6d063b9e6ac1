"""A run from recipe to published checkpoint."""
