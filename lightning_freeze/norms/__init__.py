"""Norms of weights and gradients."""
