"""Judges of a representation; none of them changes it."""
