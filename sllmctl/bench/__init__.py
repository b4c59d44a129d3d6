"""Measuring every way to load a checkpoint, and the checkpoints to measure with."""
