"""Models as one safe file: `save` and `load`, without pickle."""
