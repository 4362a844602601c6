"""The packet loop's thread with real sockets."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from waiting import wait_for

from udpwatch.dns import packet_loop as module
from udpwatch.dns.limited_log import LimitedLog
from udpwatch.dns.packet_loop import POSTED_PER_TURN, PacketLoop
from udpwatch.dns.timers import FIRED_PER_TURN

SECONDS = 10.0


@pytest.fixture
def loop() -> Iterator[PacketLoop]:
    loop = PacketLoop()
    yield loop
    loop.stop()
    assert not loop.is_alive()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the loop logs; other tests have not used up its lines."""
    monkeypatch.setattr(module, "LIMITED", LimitedLog())
    caplog.set_level(logging.ERROR, module.__name__)
    return caplog


class Link:
    """Two connected sockets. The loop reads one; what arrives is recorded."""

    def __init__(self, loop: PacketLoop, stack: ExitStack) -> None:
        self.loop = loop
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        stack.enter_context(self.ours)
        stack.enter_context(self.theirs)
        self.ours.setblocking(False)
        self.received: list[bytes] = []

    def register(self, handler: Callable[[], None] | None = None) -> None:
        self.loop.register(self.ours.fileno(), handler or self.receive)

    def receive(self) -> None:
        self.received.append(self.ours.recv(100))

    def unregister(self) -> None:
        self.loop.unregister(self.ours.fileno())


@pytest.fixture
def link(loop: PacketLoop) -> Iterator[Callable[[], Link]]:
    with ExitStack() as stack:
        yield lambda: Link(loop, stack)
        loop.stop()


def in_thread(loop: PacketLoop, call: Callable[[], object] = lambda: None) -> None:
    """Run a call in the loop's thread, and wait for it; it must not fail."""
    done = threading.Event()

    def run() -> None:
        call()
        done.set()

    loop.post(run)
    assert done.wait(SECONDS)


# ---- handlers ----


def test_handlers_of_readable_descriptors_run(loop: PacketLoop, link: Callable[[], Link]) -> None:
    first, second = link(), link()
    first.register()
    loop.start()
    in_thread(loop, second.register)
    first.theirs.send(b"one")
    second.theirs.send(b"two")
    second.theirs.send(b"three")
    wait_for(lambda: len(first.received) == 1 and len(second.received) == 2, "datagrams", SECONDS)
    assert (first.received, second.received) == ([b"one"], [b"two", b"three"])


def test_handlers_run_in_the_thread_which_has_a_name(loop: PacketLoop, link: Callable[[], Link]) -> None:
    names: list[str] = []
    one = link()

    def read() -> None:
        one.receive()
        names.append(threading.current_thread().name)
        names.append(Path("/proc/thread-self/comm").read_text().strip())

    one.register(read)
    loop.start()
    one.theirs.send(b"query")
    wait_for(lambda: len(names) == 2, "the handler", SECONDS)
    assert names == ["dns-udp", "dns-udp"]


def test_exception_in_a_handler_is_logged_and_costs_nothing_else(
    loop: PacketLoop, link: Callable[[], Link], log: pytest.LogCaptureFixture
) -> None:
    bad, good = link(), link()

    def fail() -> None:
        bad.receive()
        raise ZeroDivisionError("bomb")

    bad.register(fail)
    good.register()
    for each in (bad, good, bad, good):  # both are readable in the same turn
        each.theirs.send(b"query")
    loop.start()
    wait_for(lambda: len(good.received) == 2 and len(bad.received) == 2, "datagrams", SECONDS)
    in_thread(loop)
    assert loop.is_alive()
    assert [record.getMessage() for record in log.records] == ["dns: internal error in the UDP server"] * 2
    assert all(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in log.records)


def test_handler_may_unregister_itself_and_another_one(loop: PacketLoop, link: Callable[[], Link]) -> None:
    """Both are readable in the same turn: the one that runs first closes the other, whose handler must not run."""
    one, other = link(), link()
    ran: list[Link] = []

    def close_both(ran_first: Link) -> None:
        ran.append(ran_first)
        for each in (one, other):
            each.unregister()
            each.ours.close()

    one.register(lambda: close_both(one))
    other.register(lambda: close_both(other))
    for each in (one, other):
        each.theirs.send(b"query")
    loop.start()
    wait_for(lambda: ran, "a handler", SECONDS)
    in_thread(loop)
    assert len(ran) == 1


def test_descriptor_that_is_used_again_gets_its_new_handler(loop: PacketLoop, link: Callable[[], Link]) -> None:
    one = link()
    one.register()
    loop.start()
    new, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    received: list[bytes] = []

    def replace() -> None:
        number = one.ours.fileno()
        one.unregister()
        os.dup2(new.fileno(), number)
        loop.register(number, lambda: received.append(one.ours.recv(100)))

    with new, theirs:
        in_thread(loop, replace)
        theirs.send(b"new")
        wait_for(lambda: received, "a datagram", SECONDS)
    assert (received, one.received) == ([b"new"], [])


# ---- work of other threads ----


def test_post_wakes_the_thread(loop: PacketLoop) -> None:
    """It sleeps for an hour otherwise."""
    loop.start()
    for _ in range(3):
        in_thread(loop)


def test_posted_work_runs_in_the_thread_in_its_order(loop: PacketLoop) -> None:
    ran: list[int] = []
    threads: set[threading.Thread] = set()

    def call(number: int) -> Callable[[], None]:
        def run() -> None:
            ran.append(number)
            threads.add(threading.current_thread())

        return run

    for number in range(500):  # some before it starts
        loop.post(call(number))
        if number == 100:
            loop.start()
    in_thread(loop)
    assert ran == list(range(500))
    assert threads == {loop}


def test_posted_work_per_turn_is_bounded(loop: PacketLoop, link: Callable[[], Link]) -> None:
    """A socket that is always readable gets its turn between."""
    busy = link()
    order: list[str] = []
    busy.register(lambda: order.append("socket"))  # reads nothing
    busy.theirs.send(b"query")
    for _ in range(3 * POSTED_PER_TURN):
        loop.post(lambda: order.append("posted"))
    loop.start()
    wait_for(lambda: order.count("posted") == 3 * POSTED_PER_TURN, "posted work", SECONDS)
    in_thread(loop, busy.unregister)
    assert order[: 3 * (POSTED_PER_TURN + 1)] == ["socket", *["posted"] * POSTED_PER_TURN] * 3


def test_thread_does_not_sleep_while_posted_work_waits(loop: PacketLoop) -> None:
    """All of it has woken the thread once, for its first turn."""
    done = threading.Event()
    for _ in range(3 * POSTED_PER_TURN):
        loop.post(lambda: None)
    loop.post(done.set)
    loop.start()
    assert done.wait(SECONDS)


def test_work_that_posts_itself_again_leaves_others_their_turn(loop: PacketLoop, link: Callable[[], Link]) -> None:
    one = link()
    one.register()
    turns = 0

    def again() -> None:
        nonlocal turns
        turns += 1
        if not one.received:
            loop.post(again)

    loop.post(again)
    loop.start()
    wait_for(lambda: turns, "posted work", SECONDS)
    one.theirs.send(b"query")
    wait_for(lambda: one.received, "the datagram", SECONDS)


def test_exception_in_posted_work_costs_nothing_else(loop: PacketLoop, log: pytest.LogCaptureFixture) -> None:
    ran: list[int] = []
    loop.post(lambda: ran.append(1 // 0))
    loop.post(lambda: ran.append(2))
    loop.call_soon(lambda: ran.append(3 // 0))
    loop.call_soon(lambda: ran.append(4))
    loop.start()
    wait_for(lambda: 4 in ran, "the last call", SECONDS)
    assert ran == [2, 4]
    assert len(log.records) == 2


# ---- work at the end of a turn ----


def test_call_soon_runs_after_the_handlers_of_the_turn(loop: PacketLoop, link: Callable[[], Link]) -> None:
    order: list[str] = []
    links = [link() for _ in range(3)]

    def read(each: Link) -> None:
        each.receive()
        if not order:
            loop.call_soon(lambda: order.append("soon"))
        order.append("handler")

    for each in links:
        each.register(lambda each=each: read(each))  # type: ignore[misc]
        each.theirs.send(b"query")
    loop.post(lambda: order.append("posted"))
    loop.start()
    wait_for(lambda: "soon" in order, "the call", SECONDS)
    assert order == ["handler"] * 3 + ["posted", "soon"]


def test_call_soon_in_a_call_soon_runs_in_the_next_turn(loop: PacketLoop, link: Callable[[], Link]) -> None:
    order: list[str] = []
    busy = link()
    busy.register(lambda: order.append("turn"))
    busy.theirs.send(b"query")

    def outer() -> None:
        order.append("outer")
        loop.call_soon(lambda: order.append("inner"))

    loop.call_soon(outer)
    loop.start()
    wait_for(lambda: "inner" in order, "the call", SECONDS)
    in_thread(loop, busy.unregister)
    assert order[:4] == ["turn", "outer", "turn", "inner"]


def test_thread_does_not_sleep_while_a_call_soon_waits(loop: PacketLoop) -> None:
    """Nothing else would wake it for an hour."""
    done = threading.Event()
    loop.call_soon(lambda: loop.call_soon(done.set))
    loop.start()
    assert done.wait(SECONDS)


# ---- timers ----


def test_timers_run_when_they_are_due(loop: PacketLoop) -> None:
    fired: list[tuple[str, float]] = []
    queues = {delay: loop.delay_queue(delay, lambda name: fired.append((name, loop.now))) for delay in (0.05, 0.2)}
    begun = time.monotonic()
    loop.start()
    in_thread(loop, lambda: [queue.start(f"after {delay}", begun) for delay, queue in queues.items()])
    wait_for(lambda: len(fired) == 2, "the timers", SECONDS)
    assert [name for name, _ in fired] == ["after 0.05", "after 0.2"]
    assert fired[0][1] >= begun + 0.05
    assert fired[1][1] >= begun + 0.2


def test_many_timers_leave_sockets_their_turn(loop: PacketLoop, link: Callable[[], Link]) -> None:
    order: list[str] = []
    busy = link()
    busy.register(lambda: order.append("socket"))
    busy.theirs.send(b"query")
    queue = loop.delay_queue(0.0, lambda _: order.append("timer"))
    for number in range(2 * FIRED_PER_TURN):
        queue.start(number, 0.0)
    loop.start()
    wait_for(lambda: order.count("timer") == 2 * FIRED_PER_TURN, "the timers", SECONDS)
    in_thread(loop, busy.unregister)
    assert order[: 2 * (FIRED_PER_TURN + 1)] == ["socket", *["timer"] * FIRED_PER_TURN] * 2


def test_exception_in_a_timer_costs_nothing_else(loop: PacketLoop, log: pytest.LogCaptureFixture) -> None:
    fired: list[int] = []
    bad = loop.delay_queue(0.0, lambda number: fired.append(1 // number))
    good = loop.delay_queue(0.0, fired.append)
    for number in (1, 0, -1):
        bad.start(number, 0.0)
    good.start(7, 0.0)
    loop.start()
    wait_for(lambda: len(fired) == 3, "the timers", SECONDS)
    assert fired == [1, 7, -1], "the rest of the first queue is due in the next turn"
    assert len(log.records) == 1


@pytest.mark.parametrize("queues", [0, 2])
def test_idle_thread_sleeps(loop: PacketLoop, queues: int) -> None:
    used: list[float] = []
    for _ in range(queues):
        loop.delay_queue(1.0, lambda _: None)
    loop.start()
    in_thread(loop, lambda: used.append(time.thread_time()))
    time.sleep(0.3)
    in_thread(loop, lambda: used.append(time.thread_time()))
    assert used[1] - used[0] < 0.05


def test_now_is_the_time_of_the_turn(loop: PacketLoop) -> None:
    found: list[float] = []
    loop.start()
    begun = time.monotonic()
    in_thread(loop, lambda: found.append(loop.now))
    assert begun - 0.001 <= found[0] <= time.monotonic()


# ---- the end ----


def test_at_end_runs_once_in_its_order(loop: PacketLoop, log: pytest.LogCaptureFixture) -> None:
    ran: list[object] = []
    loop.at_end(lambda: ran.append("first"))
    loop.at_end(lambda: ran.append(1 // 0))
    loop.at_end(lambda: ran.append(threading.current_thread()))
    loop.start()
    in_thread(loop)
    assert not ran
    loop.stop()
    loop.stop()
    assert ran == ["first", loop]
    assert len(log.records) == 1


def test_work_that_was_posted_last_runs_before_the_end(loop: PacketLoop) -> None:
    """A socket that was handed over must be closed."""
    ran: list[str] = []
    loop.at_end(lambda: ran.append("end"))
    hold = threading.Event()
    loop.start()
    loop.post(lambda: hold.wait(SECONDS) and None)
    for number in range(2 * POSTED_PER_TURN):
        loop.post(lambda number=number: ran.append(str(number)))  # type: ignore[misc]
    stopping = threading.Thread(target=loop.stop)
    stopping.start()
    wait_for(lambda: loop._stopping, "the stop", SECONDS)
    hold.set()
    stopping.join(SECONDS)
    assert ran == [*map(str, range(2 * POSTED_PER_TURN)), "end"]


def test_work_over_several_turns_ends_before_what_closes(loop: PacketLoop) -> None:
    """The delivery of a response to many clients, in the turn of the stop."""
    ran: list[str] = []

    def deliver(left: int) -> None:
        ran.append("part")
        if left:
            loop.call_soon(lambda: deliver(left - 1))
        if left == 2:
            loop._stopping = True

    loop.at_end(lambda: ran.append("end"))
    loop.post(lambda: deliver(3))
    loop.start()
    loop.join(10)
    assert ran == ["part"] * 4 + ["end"]


def test_stop_before_start_runs_what_closes(loop: PacketLoop) -> None:
    ran: list[object] = []
    loop.post(lambda: ran.append("posted"))
    loop.at_end(lambda: ran.append(threading.current_thread()))
    for _ in range(2):
        loop.stop()
    assert ran == ["posted", threading.current_thread()]
    assert loop.ident is None


def test_nothing_runs_after_the_end(loop: PacketLoop) -> None:
    ran: list[str] = []
    loop.start()
    loop.stop()
    loop.post(lambda: ran.append("posted"))
    loop.stop()
    assert not ran


@pytest.mark.parametrize("started", [False, True])
def test_its_descriptors_are_closed(started: bool) -> None:
    def mine() -> list[str]:
        found = []
        for each in Path("/proc/self/fd").iterdir():
            try:
                found.append(str(each.readlink()))
            except FileNotFoundError:  # of iterdir itself
                continue
        return sorted(each for each in found if "event" in each)

    before = mine()
    loop = PacketLoop()
    assert len(mine()) == len(before) + 2
    if started:
        loop.start()
        in_thread(loop)
    loop.stop()
    assert mine() == before
