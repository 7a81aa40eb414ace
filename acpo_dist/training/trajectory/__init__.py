"""The trajectory of a run: measured on the model in use, optimised, and adopted only when it proves better."""
