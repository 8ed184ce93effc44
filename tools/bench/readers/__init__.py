"""Everybody who can read random rows of a file, one class a file, each with its best settings."""
