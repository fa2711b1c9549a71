"""`python -m esper_kernels.info`: print `info()`; with --check compare the backends, and exit with
1 if one is off."""

import argparse
import sys

from esper_kernels.info import info


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m esper_kernels.info", description="What serves where, and why."
    )
    parser.add_argument(
        "--check", action="store_true", help="compare every usable backend with eager torch"
    )
    check_too = parser.parse_args().check
    print(info())
    if not check_too:
        return 0
    from esper_kernels.info.check import check

    agreed = True
    for line, good in check():
        print(line, flush=True)
        agreed &= good
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
