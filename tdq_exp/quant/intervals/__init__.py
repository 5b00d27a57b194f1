"""Where a quantizer's step size comes from."""
