"""What every tuner shares."""
