"""The checkpoint format, its conversion, and loading it."""
