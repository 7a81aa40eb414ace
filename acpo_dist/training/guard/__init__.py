"""Watches a run for reward hacking, on figures alone: judges, statistics of images, drift."""
