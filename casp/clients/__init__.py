"""Libraries that have no registry for layers like ours, each taught in a file of its own (see `casp_entry.hook`)."""
