"""What the operating system does: how much memory there is, maps of files, and their pages."""
