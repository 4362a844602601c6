"""One namespace's facts about a port, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from udpwatch.agent.kernel.packet_tap import Conversation
from udpwatch.agent.servers.port.facts import Look, NamespaceFacts, SocketFacts
from udpwatch.agent.servers.port.firewall import Effect, Rule
from udpwatch.agent.servers.port.matching import Mismatch, Sockets

_LEAST_BUFFER_BYTES = 256  # what a datagram takes of a receive buffer at least: struct sk_buff
_WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class Case:
    """A namespace in which the port was looked at."""

    look: Look
    facts: NamespaceFacts

    @property
    def port(self) -> int:
        return self.look.port

    @property
    def time(self) -> str:
        """How long the look took, for a sentence."""
        return f"{self.look.seconds:g} s"

    @property
    def requests(self) -> tuple[Conversation, ...]:
        """The requests that arrived at a device."""
        return self.facts.traffic.conversations if self.facts.traffic else ()

    @property
    def missed(self) -> int:
        """How many datagrams of the port passed the devices and were not looked at."""
        return self.facts.traffic.missed if self.facts.traffic else 0

    @cached_property
    def foreign(self) -> list[Conversation]:
        """Those for addresses of other machines, which this one may forward."""
        return [each for each in self.requests if not each.group and each.address not in self.facts.local]

    @cached_property
    def local(self) -> list[Conversation]:
        """Those for this namespace."""
        return [each for each in self.requests if each.group or each.address in self.facts.local]

    @cached_property
    def matched(self) -> list[Conversation]:
        """Those that match a socket."""
        return [each for each in self.local if self.nearest(each) is None and self.facts.sockets]

    @cached_property
    def refused(self) -> dict[Mismatch, list[Conversation]]:
        """Those that match no socket, by what the nearest socket lacks; {} without a socket."""
        found: dict[Mismatch, list[Conversation]] = {}
        for each in self.local:
            reason = self.nearest(each)
            if reason is not None:
                found.setdefault(reason, []).append(each)
        return found

    def nearest(self, request: Conversation) -> Mismatch | None:
        """Return what the socket lacks that comes closest to a request; None: one matches, or there is no socket."""
        return self._sockets.mismatch(request) if self.facts.sockets and not request.group else None

    @cached_property
    def _sockets(self) -> Sockets:
        return Sockets(self.facts.sockets, self.facts.vrfs, self.facts.is_vrf_shared)

    @cached_property
    def lost(self) -> int:
        """How many requests matched a socket and never reached it, at least.

        Those that arrived without a reply, less everything that the sockets of the namespace took in or dropped. The
        traffic of other ports makes the number smaller, never larger. Unknown if a rule sends requests elsewhere.
        """
        counters = self.facts.counters
        if counters is None or self.redirections or any(each.has_no_process for each in self.facts.sockets):
            return 0
        arrived = sum(max(each.requests - each.replies, 0) for each in self.matched if not each.group)
        queued = sum((each.socket.queue or 0) // _LEAST_BUFFER_BYTES for each in self.facts.sockets)
        dropped = max(counters.receive_full + counters.no_memory, sum(each.drops or 0 for each in self.facts.sockets))
        return max(arrived - counters.received - dropped - queued, 0)

    @property
    def is_unanswered(self) -> bool:
        """Whether requests matched a socket and no reply left, and no rule sent them elsewhere."""
        return (
            bool(self.matched)
            and not self.redirections
            and not any(each.replies or each.wrong for each in self.matched)
        )

    def waits(self, each: SocketFacts) -> bool:
        """Return whether datagrams wait in a socket, and have for a good part of the look."""
        return bool(each.socket.queue) and each.waiting >= min(_WAIT_SECONDS, self.look.seconds / 2)

    @property
    def redirections(self) -> list[Rule]:
        """The rules that send requests for the port elsewhere."""
        rules = self.facts.firewall.rules if self.facts.firewall else ()
        return [each for each in rules if each.effect is Effect.DNAT and not each.replies]
