"""Sets of captions to calibrate on: one that comes along, and the builder of the others."""
