"""Trajectory of a run: measure the prediction error of the model, optimise the trajectory, validate and adopt it."""
