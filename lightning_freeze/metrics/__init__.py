"""Metrics that are computed without gradients."""
