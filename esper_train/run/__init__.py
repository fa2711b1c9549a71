"""A run: what it owns, its epochs, checkpoints, directory and report."""
