"""Prompt evolution: templates that make hard problems solvable, searched in a process of its own beside training."""
