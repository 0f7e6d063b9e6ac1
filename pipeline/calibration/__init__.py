"""From captions to the ranges that static scales come from."""
