"""The first half hour on a GPU, in three parts of at most ten minutes: see `__main__`."""
