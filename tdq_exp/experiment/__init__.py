"""Experiments: a configuration as objects, the stages of a run in order, and what each found or made."""
