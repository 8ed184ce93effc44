"""The JASPER dataset and its loaders: the only layer that knows a JASPER name."""
