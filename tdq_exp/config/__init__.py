"""Configuration: settings, the root, composing it, names of runs, records. Free of torch.

`setting`, `assets` and `records` may be used from any floor; `schema`, `compose` and `naming` are
made of what the components declare.
"""
