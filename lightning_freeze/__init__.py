"""Say which parameters train when; everything else in PyTorch Lightning follows exactly."""
