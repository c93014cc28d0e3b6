"""Packed sequences: a mask inside each, as one mask of all tokens."""
