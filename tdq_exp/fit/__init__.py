"""Fitting: float pre-training, quantization-aware training, and the loop, averages and checkpoints that they share."""
