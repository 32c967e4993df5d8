"""Train what is left: freezing and parameter groups."""
