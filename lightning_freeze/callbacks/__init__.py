"""Callbacks: each decides when; what is done then stands in the modules above."""
