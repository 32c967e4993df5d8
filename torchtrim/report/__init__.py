"""What is shown of models and files."""
