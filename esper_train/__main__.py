"""`python -m esper_train` is the command `esper-train`, for launchers that start modules."""

import sys

from esper_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
