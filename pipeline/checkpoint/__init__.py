"""Checkpoints on disk and on the hub: reading, laying out, writing."""
