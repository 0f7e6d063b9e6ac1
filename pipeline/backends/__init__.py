"""Quantization schemes: what a weight becomes, and what the config says of it."""
