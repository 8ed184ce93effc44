"""Measures this library, its peers and the disk itself, side by side in one run on one machine.

``python -m tools.bench run --out docs/bench/NAME.json`` measures; ``python -m tools.bench render
docs/bench/NAME.json`` writes the tables and plots of the documentation from that file. Every figure in the
documentation comes from such a file, never from a hand.
"""
