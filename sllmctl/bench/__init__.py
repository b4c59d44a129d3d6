"""Measuring loads, and the checkpoints to measure them with."""
