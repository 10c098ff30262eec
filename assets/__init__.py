"""The built-in models' data as a package, so that a wheel carries it; see README.md."""
