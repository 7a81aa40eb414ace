"""Resources of a run before it starts: parameters, memory per role, operations and time."""
