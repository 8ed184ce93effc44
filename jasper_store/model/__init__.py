"""A model to train on a JASPER dataset, and its training."""
