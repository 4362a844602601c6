"""What the agent's metrics say over time: counters never fall, whichever agent counts."""

from __future__ import annotations

from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

WRONG = "udpwatch_reply_source_mismatch_total"
CHECKED = "udpwatch_replies_checked_total"
LOST = "udpwatch_events_lost_total"
REATTACHED = "udpwatch_probe_reattached_total"

#: what begins at 0 with each agent (docs/continuity.md)
OF_ONE_AGENT = ("process_", "python_", "udpwatch_dns_", "udpwatch_heal_refused_", "udpwatch_http_", "udpwatch_probe_")

Series = tuple[str, frozenset[tuple[str, str]]]


class Scrapes:
    """The newest scrape, and the highest counts of pods."""

    def __init__(self) -> None:
        self.number = 0
        self.fallen: list[str] = []
        self.highest: Counter[int] = Counter()  # by port: a pod's series ends a while after the pod
        self._now: dict[Series, float] = {}
        self._last: dict[Series, float] = {}  # of every series that there was

    def read(self, text: str) -> None:
        """Take the text of a scrape."""
        self.number += 1
        self._now = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.endswith("_total")
        }
        for series, value in self._now.items():
            if value < (before := self._last.get(series, 0)):
                name, labels = series
                self.fallen.append(f"{name}{dict(labels)} fell from {before:g} to {value:g}")
        self._last |= self._now
        for port, count in self._by_port().items():
            self.highest[port] = max(self.highest[port], count)

    def _by_port(self) -> Counter[int]:
        counts: Counter[int] = Counter()
        for (name, labels), value in self._now.items():
            port = dict(labels).get("port", "")
            if name == WRONG and port.isdigit():
                counts[int(port)] += int(value)
        return counts

    def sum(self, name: str, label: str = "", value: str = "") -> int:
        """Return the sum of a metric's series; ``label``: only of those in which it has this value."""
        chosen = (
            count
            for (each, labels), count in self._now.items()
            if each == name and (not label or (label, value) in labels)
        )
        return int(sum(chosen))

    def agent_ended(self) -> None:
        """Forget what the next agent does not go on with."""
        self._now = {}
        self._last = {series: value for series, value in self._last.items() if not series[0].startswith(OF_ONE_AGENT)}
