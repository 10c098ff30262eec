import casp  # noqa: F401 - first: what a Ctrl-C does while the other libraries load
