"""Models: where weights come from, what a decoder is made of, and the proof that it can be served."""
