"""A cache of what frozen modules give."""
