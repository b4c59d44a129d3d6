"""Finding and fetching checkpoints of Hugging Face and ModelScope."""
