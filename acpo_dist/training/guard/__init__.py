"""Monitor a run for reward hacking from its metrics: judges, image statistics and drift."""
