"""Recipes: a model, its edits, training and export in one checked file. Imports from the files below it."""
