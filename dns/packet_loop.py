"""The thread that receives and sends UDP, for clients and to upstream servers.

Rules
1. What it serves registers a descriptor and a handler, and must neither block nor work without a bound: all clients
   wait for it.
2. Other threads hand it work with `post`.
3. An exception in a handler is logged and costs one piece of work, not the thread.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar

from udpwatch.dns.limited_log import LIMITED
from udpwatch.dns.timers import DelayQueue

POSTED_PER_TURN = 64  # calls of other threads before sockets get their turn
MAX_SLEEP_SECONDS = 3600.0

log = logging.getLogger(__name__)
_Item = TypeVar("_Item", bound=Hashable)

Call = Callable[[], None]


class PacketLoop(threading.Thread):
    """Calls handlers when their descriptors are readable and timers when they are due."""

    def __init__(self) -> None:
        super().__init__(name="dns-udp", daemon=True)
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._handlers: dict[int, Call] = {}
        self._queues: list[DelayQueue[Any]] = []
        self._soon: deque[Call] = deque()
        self._posted: deque[Call] = deque()
        self._closing: deque[Call] = deque()
        self._stopping = False
        self.now = time.monotonic()  # seconds, at the begin of this turn

    # ---- for other threads ----

    def post(self, call: Call) -> None:
        """Run ``call`` in the thread. Once the thread has ended, nothing runs."""
        self._posted.append(call)
        self._wake_up()

    def stop(self) -> None:
        """Stop the thread and run the calls of `at_end`; return when that is done."""
        self._stopping = True
        if self.ident is None:  # never started
            self._close()
        else:
            self._wake_up()
            self.join()

    def _wake_up(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the thread has ended; Python refuses -1 with a ValueError
            os.eventfd_write(self._wake, 1)

    # ---- for the thread itself, and before it starts ----

    def register(self, descriptor: int, handler: Call) -> None:
        """Call ``handler`` in each turn in which there is something to receive."""
        self._handlers[descriptor] = handler
        self._epoll.register(descriptor, select.EPOLLIN)

    def unregister(self, descriptor: int) -> None:
        """Forget a descriptor, before it is closed: it may be another file's a moment later."""
        del self._handlers[descriptor]
        self._epoll.unregister(descriptor)

    def call_soon(self, call: Call) -> None:
        """Run ``call`` after the handlers of this turn; in a call of that kind, in the next turn."""
        self._soon.append(call)

    def delay_queue(self, delay: float, action: Callable[[_Item], None]) -> DelayQueue[_Item]:
        """Create a queue of timers."""
        queue = DelayQueue(delay, action)
        self._queues.append(queue)
        return queue

    def at_end(self, call: Call) -> None:
        """Run ``call`` when the thread stops."""
        self._closing.append(call)

    # ---- the thread ----

    def run(self) -> None:
        """Serve until `stop`."""
        with contextlib.suppress(OSError), open("/proc/thread-self/comm", "w") as comm:  # noqa: PTH123
            comm.write(self.name)  # `top -H` shows it
        try:
            while not self._stopping:
                self._turn()
        except BaseException:
            log.exception("dns: the UDP server has stopped after an internal error")
            raise
        finally:
            self._close()

    def _turn(self) -> None:
        handlers, ready = self._handlers, self._epoll.poll(self._timeout())
        self.now = time.monotonic()
        for descriptor, _ in ready:
            handler = handlers.get(descriptor)
            try:
                if handler is not None:  # else closed in this turn
                    handler()
                elif descriptor == self._wake:
                    os.eventfd_read(self._wake)
            except Exception as error:  # a bug must not cost the thread
                _log_bug(error)
        for _ in range(min(len(self._posted), POSTED_PER_TURN)):
            self._call(self._posted.popleft())
        for queue in self._queues:
            if queue.next() <= self.now:
                self._call(partial(queue.run, self.now))
        for _ in range(len(self._soon)):
            self._call(self._soon.popleft())

    def _call(self, call: Call) -> None:
        try:
            call()
        except Exception as error:
            _log_bug(error)

    def _timeout(self) -> float:
        """Return how long nothing is due, in seconds."""
        if self._soon or self._posted:
            return 0.0
        due = min((queue.next() for queue in self._queues), default=math.inf)
        return min(max(due - time.monotonic(), 0.0), MAX_SLEEP_SECONDS)

    def _close(self) -> None:
        for _ in range(len(self._posted)):  # a socket that was handed over last must be closed, too
            self._call(self._posted.popleft())
        while self._soon:  # the rest of what is delivered over several turns
            self._call(self._soon.popleft())
        while self._closing:
            self._call(self._closing.popleft())
        self._epoll.close()
        wake, self._wake = self._wake, -1
        if wake >= 0:
            os.close(wake)


def _log_bug(error: Exception) -> None:
    LIMITED.write(log, logging.ERROR, "dns: internal error in the UDP server", error=error)
