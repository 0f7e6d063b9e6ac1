"""vLLM's own environment and what runs in it."""
