"""What is found by trying: budgets that only a measured file can tell. Imports from export and below."""
