"""The errors of a run or an epoch that cannot go on because of its numbers."""

from typing import Any


class BadNumbersError(ArithmeticError):
    """The losses went bad, and by the policy of `train.on_bad_numbers` training cannot go on.

    `result` is what was measured: an `EpochResult` where `train_one_epoch` raised, None in a run,
    which reports its epochs itself.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


class NonFiniteLossError(BadNumbersError):
    """The loss became NaN or infinite."""


class RanksDifferError(RuntimeError):
    """Processes that train one network together do not have the same one any more."""


class RankLostError(RuntimeError):
    """A process lost contact with others that train the network with it. The message names those
    that failed or do not answer."""
