"""What a model is worth, on fixed prompts and seeds."""
