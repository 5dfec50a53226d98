"""From a config to the parts of a run: one make_* per noun, each checking what it reads."""
