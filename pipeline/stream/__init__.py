"""Streams a checkpoint through memory: data-free, or layer by layer with calibration."""
