"""The checkpoint store: a daemon that keeps checkpoints warm in host memory, and its client."""
