"""Read a model: what is called, in which order, with which shapes and at what cost."""
