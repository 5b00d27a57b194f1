"""Experiments: a configuration as objects, and the stages of a run in order."""
