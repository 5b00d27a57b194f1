"""Quantizers as four slots: grid x interval x rule x plan. Plain torch; knows nothing of diffusion, files or configs."""
