"""Verification: is a checkpoint whole, and what will vLLM make of it."""
