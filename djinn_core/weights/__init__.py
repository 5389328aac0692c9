"""Weights: a plan of what stays on the device, a packed store on the host, and a ring that streams between them."""
