"""Many trainings as one program: a grid of members, its waves, its table."""
