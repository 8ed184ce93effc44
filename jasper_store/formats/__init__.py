"""Where the bytes of a tensor lie in a file, one module per format, and how rows are written."""
