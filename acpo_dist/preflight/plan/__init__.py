"""Estimate the resources of a run: parameters, memory per role, operations and time."""
