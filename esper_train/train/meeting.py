"""The meeting of the processes of a run, and the search for those that are missing.

Both go through torch's store of keys and values. `torchrun` keeps one store over all restarts, with
the network addresses of processes that have ended; a new process that reads one of them cannot
connect. So every start begins with a greeting that only running processes can answer, and uses keys
of its own after it.
"""

import json
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from esper_train.base.stop import Stopped, StopRequest
from esper_train.train.errors import RankLostError

ROLL_CALL = 5.0
"""Seconds in which ranks that lost contact wait for the others to say why they end."""
PAUSE = 0.1
"""Seconds between two looks at the store."""


@dataclass(frozen=True)
class Meeting:
    """One start of `world` ranks, of which this process is `rank`. No other start shares the keys
    of its store: `host/RANK` says where a rank runs, `ends` which ranks have ended and why."""

    store: Store
    rank: int
    world: int

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Tell the other ranks of an error inside. Where it came of losing contact with them, raise
        `RankLostError`, which names those that failed or do not answer."""
        try:
            yield
        except BaseException as error:
            if not lost_contact(error):
                self._ask_others(f"{type(error).__name__}: {error}")
                raise
            raise RankLostError(
                f"{self._ask_others('')}; resume from the newest checkpoint ({error})"
            ) from error

    def _ask_others(self, reason: str) -> str:
        """Say why this rank ends, "" if it lost contact; returns what became of the others then.

        A store that cannot be reached may block for long, so another thread asks it.
        """
        found: list[str] = []

        def ask() -> None:
            try:
                line = json.dumps([self.rank, reason]) + "\n"
                self.store.append("ends", line)  # type: ignore[attr-defined]  # torch's stub lacks it
                found.append("" if reason else self._fate_of_others())
            except dist.DistError:
                pass  # what is returned then says so

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(2 * ROLL_CALL)
        if found:
            return found[0]
        return (
            f"rank {self.rank} on {socket.gethostname()} reaches neither the other ranks nor their "
            "store: it is cut off from them, or the machine of rank 0 is gone"
        )

    def _fate_of_others(self) -> str:
        """The ranks that failed, with their reasons; if none did, those that do not answer."""
        deadline = time.monotonic() + ROLL_CALL
        while True:
            ends = [json.loads(line) for line in self.store.get("ends").splitlines()]
            failed = [f"{self._name(rank)} failed: {reason}" for rank, reason in ends if reason]
            if failed:
                return "; ".join(failed)
            if len(ends) == self.world:
                return "the ranks lost contact with each other, though all of them are there"
            if time.monotonic() > deadline:
                silent = sorted(set(range(self.world)) - {rank for rank, _ in ends})
                return (
                    f"no answer from {', '.join(map(self._name, silent))}: killed, stopped, cut "
                    "off, or busy for longer than distributed.timeout"
                )
            time.sleep(PAUSE)

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.store.get(f'host/{rank}').decode()}"


def meet(seconds: float, stop: StopRequest) -> Meeting:
    """Wait until all ranks that the environment speaks of have started.

    Raises:
        ValueError: the environment does not say how to find the others.
        RankLostError: some did not come within `seconds`; the message names them.
        Stopped: a signal came first.
    """
    try:
        store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
    except dist.DistError as error:
        raise RankLostError(
            f"the ranks did not meet within {seconds:g} seconds: {error}"
        ) from error
    return meet_in(store, rank, world, seconds, stop)


def meet_in(store: Store, rank: int, world: int, seconds: float, stop: StopRequest) -> Meeting:
    """Do the same as `meet`, with a store that may hold what earlier starts left."""
    deadline = time.monotonic() + seconds
    own = uuid.uuid4().hex
    if rank == 0:
        ours = PrefixStore(own, store)
        ours.set("host/0", socket.gethostname())
        missing = _greet(store, own, world, deadline, stop)
        ours.set("missing", missing)
    else:
        store.set(f"arrived/{rank}", own)
        start = _read(store, f"start/{own}", deadline + ROLL_CALL, stop)
        ours = PrefixStore(start, store)
        ours.set(f"host/{rank}", socket.gethostname())
        missing = _read(ours, "missing", deadline + ROLL_CALL, stop)
    if missing:
        raise RankLostError(
            f"of {world} ranks, these did not start within {seconds:g} seconds "
            f"(distributed.timeout): {missing}"
        )
    return Meeting(ours, rank, world)


def _greet(store: Store, start: str, world: int, deadline: float, stop: StopRequest) -> str:
    """Tell each rank the name of this start, as rank 0. Returns the ranks that did not come.

    What is left of an earlier start is answered too, but nobody reads it.
    """
    pending = list(range(1, world))
    while pending and time.monotonic() < deadline:
        _obey(stop)
        for rank in pending:
            if store.check([f"arrived/{rank}"]):
                store.set(f"start/{store.get(f'arrived/{rank}').decode()}", start)
        time.sleep(PAUSE)
        pending = [rank for rank in pending if not store.check([f"{start}/host/{rank}"])]
    return ", ".join(map(str, pending))


def _read(store: Store, key: str, deadline: float, stop: StopRequest) -> str:
    """The value that rank 0 writes under the key."""
    while not store.check([key]):
        _obey(stop)
        if time.monotonic() > deadline:
            raise RankLostError("rank 0 did not start within distributed.timeout")
        time.sleep(PAUSE)
    return store.get(key).decode()


def _obey(stop: StopRequest) -> None:
    if stop.signal is not None:
        raise Stopped(stop.signal)


def lost_contact(error: BaseException) -> bool:
    """Whether the error, or one that led to it, is of a collective that failed because of another
    rank or the network. gloo raises a plain RuntimeError whose message has the place in its
    source."""
    if isinstance(error, dist.DistError):
        return True
    if isinstance(error, RuntimeError) and "/gloo/transport/" in str(error):
        return True
    before = error.__cause__ or error.__context__
    return before is not None and lost_contact(before)
