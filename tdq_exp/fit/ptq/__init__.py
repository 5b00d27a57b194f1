"""Post-training quantization: calibration sets, and block by block reconstruction."""
