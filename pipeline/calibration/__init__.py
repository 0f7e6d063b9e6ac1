"""From captions to the amax that static scales come from."""
