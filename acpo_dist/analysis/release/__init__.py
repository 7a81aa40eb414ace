"""Exports, model cards and promotion to the model registry."""
