"""How a tensor is mapped to codes, and how gradients pass."""
