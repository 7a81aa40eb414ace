"""Evaluation of models and images on suites of prompts, by judges, resumable and on any backend."""
