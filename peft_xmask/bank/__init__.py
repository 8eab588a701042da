"""Banks: very many profiles by name."""
