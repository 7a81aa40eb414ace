"""Evaluation of models and pictures on suites of prompts, by judges, resumable and on any backend."""
