"""`acpo demo`."""
