"""Whether a run may be promoted, its model card, and its way into the model registry."""
