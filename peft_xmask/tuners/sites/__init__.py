"""Adapters that read a module's activations."""
