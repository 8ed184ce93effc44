"""Arrow IPC files and streams, read in place."""
