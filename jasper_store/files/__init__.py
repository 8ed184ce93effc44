"""One atomic write, one lock, one fingerprint of a file."""
