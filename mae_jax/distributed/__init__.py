"""Processes of a run, sharding over devices, inference over datasets, verified checkpoints."""
