"""Reports, comparisons and lists of runs."""
