"""Change a model: one family of edits a file."""
