"""What freezes and unfreezes: parameters, BatchNorm, optimizers, the wrapper of a strategy."""
