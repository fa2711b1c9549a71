"""`python -m esper_kernels.info`: print `info()`."""

from esper_kernels.info import info

print(info())
