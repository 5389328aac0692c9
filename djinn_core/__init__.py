"""GPU memory as a cache in front of host memory, for model weights and paused inference sessions."""
