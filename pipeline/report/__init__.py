"""What people read: the console and the model card."""
