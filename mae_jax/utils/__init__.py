"""Helpers that know nothing of MAE."""
