"""What will happen to every tensor and every byte, decided before the first tensor is read."""
