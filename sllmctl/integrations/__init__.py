"""What other libraries need to load through us; each is imported where it is used."""
