"""HDF5: headers, chunk index, heap, parallel chunk reading and writing."""
