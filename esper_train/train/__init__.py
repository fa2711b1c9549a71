"""The epoch loop and what it needs; it knows no seed."""
