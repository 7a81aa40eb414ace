"""Train every combination of given values with every seed, and compare them."""
