"""A static roofline of the GPU kernels, from their machine code."""
