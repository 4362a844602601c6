"""Follow the addresses of each network namespace that is healed, in a thread of its own.

Rules
1. The agent's own namespace is always followed. Others are followed while a selected server lives there, if the agent
   may enter them. Following keeps a namespace alive, so it ends as soon as the server's process has left it.
2. A tenant may create any number of namespaces: one that holds as many as are free gets no more. What is not followed
   is not healed, and is reported.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from udpwatch.agent.heal.addresses import Bounds, LocalAddresses, TooManyChangesError
from udpwatch.agent.kernel import netns
from udpwatch.agent.kernel.cpu import show_name

MAX_NAMESPACES = 64  # beside the agent's own
MAX_OWN_ADDRESSES = 16_384  # of the agent's own namespace
MAX_OTHER_ADDRESSES = 256  # of each other one
OTHER_CHANGES_PER_SECOND = 100
OWN = Bounds(MAX_OWN_ADDRESSES, changes_per_second=1_000, burst=2 * MAX_OWN_ADDRESSES)
OTHER = Bounds(MAX_OTHER_ADDRESSES, OTHER_CHANGES_PER_SECOND, burst=4 * MAX_OTHER_ADDRESSES)
TURN_SECONDS = 1.0
SETTLING_SECONDS = 0.1
RETRY_SECONDS = 10.0
STOP_SECONDS = 5.0
MAX_REPORTED = 8  # namespaces that are not healed, with their reasons; the rest is a number

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A namespace in which a selected server lives."""

    pid: int  # of the server
    tenant: str
    name: str  # of the server, for the report


@dataclass(frozen=True, slots=True)
class _State:
    """What was followed at the end of a turn: other threads read this, and never wait for a turn."""

    followed: frozenset[int]
    addresses: int
    lines: tuple[str, ...]  # why namespaces are not healed; the agent's own comes first


class Namespaces:
    """Follows namespaces from `start` to `close`. Between these, only its thread uses what it has opened."""

    def __init__(self, local_devices: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Enter the addresses of the namespace of the calling thread in the map ``local_devices``. Raises OSError."""
        self._map, self._clock = local_devices, clock
        self._home = netns_inode()
        self._wanted: dict[int, Wanted] = {}
        self._next_wanted: dict[int, Wanted] = {}  # as set by another thread, for the next turn
        self._followed: dict[int, LocalAddresses] = {}
        self._failed: dict[int, tuple[float, str]] = {}  # when it is tried again, and why it is not followed
        self._followed[self._home] = LocalAddresses(local_devices, OWN, clock())
        self._home_fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._next_check = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heal", daemon=True)
        self._publish()

    @property
    def addresses(self) -> int:
        """The number of addresses in the map."""
        return self._state.addresses

    @property
    def followed(self) -> int:
        """The number of namespaces that are healed."""
        return len(self._state.followed)

    def is_followed(self, inode: int) -> bool:
        """Return whether a namespace is healed."""
        return inode in self._state.followed

    def not_healed(self) -> tuple[str, ...]:
        """Return why namespaces are not healed, one line each."""
        return self._state.lines

    def _publish(self) -> None:
        order = sorted(self._failed.items(), key=lambda each: (each[0] != self._home, each[0]))
        lines = [self._line(inode, reason) for inode, (_, reason) in order[:MAX_REPORTED]]
        if len(order) > MAX_REPORTED:
            lines.append(f"{len(order) - MAX_REPORTED} more network namespaces")
        self._state = _State(frozenset(self._followed), sum(map(len, self._followed.values())), tuple(lines))

    def _line(self, inode: int, reason: str) -> str:
        if inode == self._home:
            return f"the agent's network namespace: {reason}"
        wanted = self._wanted.get(inode)
        return f"network namespace {inode}{f' of {wanted.name}' if wanted else ''}: {reason}"

    def want(self, wanted: Mapping[int, Wanted]) -> None:
        """Set the namespaces to follow beside the agent's own, by their inode numbers."""
        self._next_wanted = {inode: each for inode, each in wanted.items() if inode != self._home}

    def start(self) -> None:
        """Follow changes in a thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop, and remove all addresses from the map."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():  # it still uses them, and the process's end closes them
            return
        for each in self._followed.values():
            each.close()
        self._followed.clear()
        os.close(self._home_fd)

    def _run(self) -> None:
        try:
            show_name()
            while not self._stopping.is_set():
                self._wait()
                self._turn(self._clock(), self._home_fd)
                self._publish()
        except Exception as error:
            log.exception("cannot follow local addresses any longer: nothing is healed")
            for inode in [self._home, *self._followed]:
                self._give_up(inode, math.inf, f"internal error: {error!r}; restart the agent")
            self._publish()

    def _wait(self) -> None:
        poll = select.poll()
        for each in self._followed.values():
            poll.register(each.fileno(), select.POLLIN)
        settling = any(each.is_settling for each in self._followed.values())
        seconds = SETTLING_SECONDS if settling else TURN_SECONDS
        # Many changes at once are cheaper to read than each by itself, and none of them is urgent.
        if poll.poll(seconds * 1000):
            self._stopping.wait(SETTLING_SECONDS / 10)

    def _turn(self, now: float, home: int) -> None:
        before, self._wanted = self._wanted, self._next_wanted
        for inode, wanted in self._wanted.items():
            if inode in before and before[inode].pid != wanted.pid:  # the server was restarted
                self._failed.pop(inode, None)
        for inode, each in list(self._followed.items()):
            try:
                each.read(now)
            except OSError as error:
                self._give_up(inode, now, f"cannot read its addresses: {error.strerror}")
            except TooManyChangesError:
                self._give_up(inode, now, "its addresses change too often")
            except Exception as error:  # one namespace must not end the others
                log.exception("cannot follow the addresses of network namespace %d", inode)
                self._give_up(inode, now, f"internal error: {error!r}")
        if now >= self._next_check:
            self._next_check = now + TURN_SECONDS
            for inode in [inode for inode in self._followed if inode != self._home and not self._lives(inode)]:
                self._followed.pop(inode).close()
        for inode in self._failed.keys() - self._wanted.keys() - {self._home}:
            del self._failed[inode]
        self._follow_more(now, home)

    def _give_up(self, inode: int, now: float, reason: str) -> None:
        followed = self._followed.pop(inode, None)
        if followed:
            followed.close()
        self._failed[inode] = now + RETRY_SECONDS, reason

    def _lives(self, inode: int) -> bool:
        """Return whether a selected server's process still uses a namespace."""
        wanted = self._wanted.get(inode)
        if wanted is None:
            return False
        with contextlib.suppress(OSError):
            return any(os.fstat(fd).st_ino == inode for fd in netns.of_process(wanted.pid))
        return False

    def _follow_more(self, now: float, home: int) -> None:
        held = Counter(self._wanted[inode].tenant for inode in self._followed.keys() & self._wanted.keys())
        for inode in {self._home, *self._wanted} - self._followed.keys():
            if self._failed.get(inode, (0.0, ""))[0] > now:
                continue
            wanted = self._wanted.get(inode)
            if wanted is None:
                self._follow(inode, home, OWN, now)
                continue
            free = MAX_NAMESPACES - (len(self._followed) - (self._home in self._followed))
            if held[wanted.tenant] >= free:
                self._failed[inode] = now + RETRY_SECONDS, f"more than {MAX_NAMESPACES} network namespaces"
                continue
            held[wanted.tenant] += self._follow_of_process(inode, wanted.pid, now)

    def _follow_of_process(self, inode: int, pid: int, now: float) -> bool:
        reason = "the process of its server cannot be found"
        try:
            for fd in netns.of_process(pid):
                if os.fstat(fd).st_ino == inode:
                    return self._follow(inode, fd, OTHER, now)
            if pid and Path(f"/proc/{pid}").exists():
                reason = "the agent cannot open it; entering namespaces requires CAP_SYS_ADMIN and CAP_SYS_PTRACE"
        except OSError as error:
            reason = f"cannot open it: {error.strerror}"
        self._failed[inode] = now + RETRY_SECONDS, reason
        return False

    def _follow(self, inode: int, fd: int, bounds: Bounds, now: float) -> bool:
        try:
            with netns.entered(fd):
                self._followed[inode] = LocalAddresses(self._map, bounds, now)
        except OSError as error:
            self._give_up(inode, now, f"cannot enter it: {error.strerror}; this requires CAP_SYS_ADMIN")
            return False
        except Exception as error:  # one namespace must not end the others
            log.exception("cannot follow the addresses of network namespace %d", inode)
            self._give_up(inode, now, f"internal error: {error!r}")
            return False
        self._failed.pop(inode, None)
        return True


def netns_inode() -> int:
    """Return the inode number of the network namespace of the calling thread."""
    return Path("/proc/thread-self/ns/net").stat().st_ino
