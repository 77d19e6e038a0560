"""Which parameters train when."""
