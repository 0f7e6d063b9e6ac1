"""What is in a checkpoint: the language model, and the rest."""
