"""Look over a machine: what is here, what does not fit together, and what to do about it."""
