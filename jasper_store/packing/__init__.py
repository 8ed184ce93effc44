"""Samples written out in the order in which they are served: what each reads, side by side, in blocks."""
