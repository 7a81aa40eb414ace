"""What a run will need, worked out before it starts: parameters, memory per role, arithmetic and time."""
