"""A cache of the outputs of frozen modules: everything an output depends on is in its key."""
