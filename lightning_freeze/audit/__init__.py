"""Proof that what is frozen is frozen, and that what trains gets gradients."""
