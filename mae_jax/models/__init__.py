"""Flax modules of the networks. No other package imports flax."""
