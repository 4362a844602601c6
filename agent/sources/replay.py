"""Play recorded events in place of the kernel: for tests, screens and bug reports, without root.

A recording is a file of `udpwatch run --events FILE`. It is played at its own pace without long pauses. The senders
come from the recording too, because their processes may run on another machine or be gone.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from udpwatch.agent.errors import UsageError
from udpwatch.agent.kernel.records import printable
from udpwatch.agent.model import Cause, Counters, Event, Finding, Increase, Probe, Sample, Sender, Tuple, Verdict

MAX_LINE = 65_536
MAX_EVENTS = 10_000
MAX_PAUSE_SECONDS = 1.0
MAX_SENDERS = 100_000
_MAX_NUMBER = 1 << 63
_MAX_TIME = 253_402_300_799  # the last second that datetime knows

log = logging.getLogger(__name__)


class Replay:
    """Be a FindingSource and its SenderLookup."""

    mode = "replay"
    attached = True
    left_out = 0  # of the lookups: none

    def __init__(self, path: Path) -> None:
        """Open the recording; raises UsageError if there is none or it has no event."""
        self._path = path
        try:
            self._file: TextIO | None = path.open(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UsageError(f"--replay: cannot read {str(path)!r}: {error.strerror}") from None
        self._number = self._bad = self._played = self._wrong = 0
        self._senders: dict[Sender, int] = {}
        self._by_number: list[Sender] = []
        self._counts: dict[Finding, int] = {}
        self._increases: list[Increase] = []
        self._begun = time.monotonic()
        self._position = 0.0  # seconds of the recording that have been played
        self._last: float | None = None  # seconds since the epoch, of the event before
        self._next: tuple[float, Event] | None = None
        self._next = self._read_next()
        if self._next is None:
            self.close()
            raise UsageError(
                f"--replay: cannot play {str(path)!r}: it has no event; record with `udpwatch run --events FILE`"
            )

    def lookup(self, seen: Increase | Event) -> Sender:
        """Return the recorded sender."""
        return self._by_number[seen.finding.cgroup]

    def sender_of(self, _pid: int, process: str, _cgroup: int, _netns: int) -> Sender:
        """Return the name: a recording has no servers."""
        return Sender(process)

    def has_ended(self, _sender: Sender, _now: float) -> bool:
        """Return False: a recording does not have the ends of processes."""
        return False

    def namespace_of(self, _tenant: int) -> str:
        """Return "": a recording has no table of findings that could overflow."""
        return ""

    def clock_offset(self) -> float:
        """Return 0: a recording has seconds since the epoch."""
        return 0.0

    def wait(self, seconds: float) -> None:
        """Wait until the next event is due or the time is over."""
        due = self._next[0] - (time.monotonic() - self._begun) if self._next else seconds
        time.sleep(max(0.0, min(seconds, due)))

    def events(self, most: int = MAX_EVENTS) -> Iterator[Event]:
        """Yield up to ``most`` due events."""
        for _ in range(most):
            if not self._next or self._next[0] > time.monotonic() - self._begun:
                return
            event = self._next[1]
            self._add(event)
            self._next = self._read_next()
            yield event

    def sample(self, _expire_ns: int) -> Sample:
        """Return what was played since the last call."""
        increases, self._increases = tuple(self._increases), []
        # Right replies are not recorded: the known replies are all wrong, or healed.
        counters = Counters(checked=self._played, wrong=self._wrong, unparsed=self._bad)
        return Sample(increases, counters, (), 0, 0, 0)

    def self_test(self) -> bool:
        """Return True: there are no programs to test."""
        return True

    def keep_attached(self) -> list[str]:
        """Return no changes: nothing is attached."""
        return []

    def probes(self) -> tuple[Probe, ...]:
        """Return no programs."""
        return ()

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
            self._file = None

    def _add(self, event: Event) -> None:
        before = self._counts.get(event.finding, 0)
        self._counts[event.finding] = event.count
        # Events are samples, but their counts are exact. If a count fell, the agent was restarted.
        more = event.count - before if event.count > before else event.count
        self._played += more
        self._wrong += 0 if event.finding.verdict is Verdict.HEALED else more
        self._increases.append(Increase(event.finding, more, event.time, event.pid))

    def _read_next(self) -> tuple[float, Event] | None:
        """Return (the second at which it is due, the next event)."""
        while self._file and (line := self._file.readline(MAX_LINE)):
            self._number += 1
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                at = datetime.fromisoformat(record["time"]).timestamp()
                if not 0 <= at < _MAX_TIME:
                    raise ValueError(f"invalid time {record['time']!r}")
                event = self._event(record, at)
            except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
                self._bad += 1
                log.warning("%s line %d: skipped, not an event: %s", self._path, self._number, error)
                continue
            if self._last is not None:
                self._position += min(max(at - self._last, 0.0), MAX_PAUSE_SECONDS)
            self._last = at
            return self._position, event
        return None

    def _event(self, record: dict[str, Any], at: float) -> Event:
        cause, verdict = Cause(record["cause"]), Verdict(record["verdict"])
        is_forwarded = cause is Cause.FORWARDED
        request = _tuple(record["conntrack"]["request"])
        if is_forwarded != (request is not None) or (verdict is Verdict.HEALED and cause is not Cause.KERNEL_CHOSEN):
            raise ValueError(f"cause {cause} and verdict {verdict} do not fit the rest")
        sender = Sender(
            process="" if is_forwarded else _text(record["process"]) or "unknown",
            pid=0 if is_forwarded else _whole(record["pid"] or 0, _MAX_NUMBER),
            cgroup=_text(record["cgroup"]),
            container=_text(record["container"]),
            namespace=_text(record["namespace"]),
            pod=_text(record["pod"]),
        )
        finding = Finding(
            expected=_text(record["expected"]),
            actual=_text(record["actual"]),
            port=_whole(record["port"], 65_535),
            family=_one_of(record["family"], (4, 6)),
            verdict=verdict,
            cause=cause,
            process=sender.process,
            cgroup=self._number_of(sender),
            netns=_whole(record["netns"] or 0, _MAX_NUMBER),
            interface=_text(record["interface"]) if is_forwarded else "",
        )
        conntrack = record["conntrack"]
        return Event(
            finding=finding,
            time=int(at * 1e9),
            count=_whole(record["count"], _MAX_NUMBER),
            peer=_text(record["peer"]),
            peer_port=_whole(record["peer_port"], 65_535),
            segments=1,
            pid=sender.pid,
            uid=_whole(record["uid"] or 0, _MAX_NUMBER),
            netns_inode=_whole(record["netns"] or 0, _MAX_NUMBER) or None,
            original=_tuple(conntrack["original"]),
            reply=_tuple(conntrack["reply"]),
            conversation=None,
            request=request,
            pktinfo=_one_of(record["pktinfo"], (None, True, False)),
        )

    def _number_of(self, sender: Sender) -> int:
        number = self._senders.get(sender)
        if number is None:
            if len(self._by_number) >= MAX_SENDERS:
                raise ValueError(f"more than {MAX_SENDERS} different senders")
            number = self._senders[sender] = len(self._by_number)
            self._by_number.append(sender)
        return number


def _text(value: object) -> str:
    if not isinstance(value, str | None):
        raise ValueError(f"invalid value {value!r:.40}: expected a text")
    return printable((value or "").encode(errors="backslashreplace"))


def _whole(value: object, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"invalid value {value!r:.40}: expected a number from 0 to {most}")
    return value


def _one_of(value: Any, known: Sequence[Any]) -> Any:
    if not any(value is each for each in known):
        raise ValueError(f"invalid value {value!r:.40}: expected one of {', '.join(map(str, known))}")
    return value


def _tuple(record: dict[str, Any] | None) -> Tuple | None:
    if record is None:
        return None
    return Tuple(
        _text(record["source"]),
        _whole(record["source_port"], 65_535),
        _text(record["destination"]),
        _whole(record["destination_port"], 65_535),
    )
