"""Whether a server will make of a checkpoint what it should."""
