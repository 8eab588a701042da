"""Adapters that live in the base model's own parameters."""
