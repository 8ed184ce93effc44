"""The compiled part of the package: C sources and their bindings."""
