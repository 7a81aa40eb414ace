"""Metrics of a model on fixed prompts and seeds."""
