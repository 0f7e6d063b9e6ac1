"""The machine that this runs on: the only readers of /proc, control groups, nvidia-smi and mounts."""
