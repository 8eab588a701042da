"""Training very many profiles in one run."""
