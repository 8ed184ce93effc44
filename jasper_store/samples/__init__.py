"""Which rows a sample reads: its declaration, compiled, and the datasets that serve it."""
