"""Measure a model: latency in fair rounds."""
