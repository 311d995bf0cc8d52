"""Noise schedules, preconditioning, ODE steps, and the two forms of an image."""
