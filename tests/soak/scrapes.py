"""What the agent's metrics say over time: counters never fall."""

from __future__ import annotations

from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

WRONG = "udpwatch_reply_source_mismatch_total"
CHECKED = "udpwatch_replies_checked_total"
LOST = "udpwatch_events_lost_total"
REATTACHED = "udpwatch_probe_reattached_total"

Series = tuple[str, frozenset[tuple[str, str]]]


class Scrapes:
    """The newest scrape of the running agent, the highest counts of pods, and the sums of agents that have ended."""

    def __init__(self) -> None:
        self.number = 0
        self.fallen: list[str] = []
        self.highest: Counter[int] = Counter()  # by port: a pod's series ends a while after the pod
        self._now: dict[Series, float] = {}
        self._last: dict[Series, float] = {}  # of each series that this agent ever had
        self._former: Counter[tuple[str, str, str]] = Counter()

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
        """Return the sum of a metric's series, of all agents; ``label``: only series in which it has this value."""
        return self._former[name, label, value] + self._sum(name, label, value)

    def _sum(self, name: str, label: str, value: str) -> int:
        chosen = (count for (each, labels), count in self._now.items()
                  if each == name and (not label or (label, value) in labels))  # fmt: skip
        return int(sum(chosen))

    def agent_ended(self) -> None:
        """Add up what this agent counted: the next one begins at 0."""
        for (name, labels), value in self._now.items():
            for label, of in (*labels, ("", "")):
                self._former[name, label, of] += int(value)
        self._now, self._last = {}, {}
