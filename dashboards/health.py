"""The agents themselves: whether they see, what they lose, and what they cost."""

from __future__ import annotations

from fleet import BLIND
from grafana_foundation_sdk.builders.dashboard import Row
from grafana_foundation_sdk.models.dashboard import Dashboard
from parts import (
    AGENT,
    AGENTS,
    MISMATCH,
    ORANGE,
    RED,
    SCOPE,
    TARGET,
    WHERE,
    WHERE_LEGEND,
    Column,
    board,
    count,
    increase,
    lines,
    number,
    of_agents,
    rate,
    rows,
)


def of(name: str, matchers: str = "") -> str:
    """A metric of the agent's, of the chosen nodes."""
    return f"udpwatch_{name}{{{SCOPE}{', ' if matchers else ''}{matchers}}}"


def process(name: str) -> str:
    """A metric of the agent's process."""
    return f"process_{name}{{{SCOPE}}}"


def per_agent(expression: str) -> str:
    """A number of each agent, with what it is."""
    return f"max by ({LABELS}) ({AGENTS} * on ({TARGET}) group_left () {expression})"


LABELS = f"{WHERE}, version, kernel, mode"
#: all that is lost but events of which enough have been told
LOST = of("events_lost_total", 'stage!="rate_limit"')
OTHER = f'{MISMATCH}{{{SCOPE}, port="other"}}'
DOWN = f'up{{job=~".*udpwatch.*", {SCOPE}}} == 0'
BPF_STATS = "Only while the sysctl kernel.bpf_stats_enabled is 1, which costs some nanoseconds a run itself."


def dashboard() -> Dashboard:
    """Built anew at each call."""
    return board(
        AGENT,
        "udpwatch / Agents",
        "Whether the agents see what happens on their nodes, what they lose, and what they cost.",
        number("Agents", "Agents that Prometheus knows now.", f"count({AGENTS})"),
        number(
            "Down",
            "Targets of jobs with udpwatch in their name that Prometheus cannot scrape.",
            count(DOWN),
            steps=[(1, RED)],
        ),
        number(
            "Blind",
            "Agents whose programs at the root cgroup are detached, or that did not see their own test datagram.",
            count(BLIND),
            steps=[(1, RED)],
        ),
        number(
            "Lost",
            "Events and suspicions lost within the time chosen above; without events held back since enough of the "
            "same finding had been told.",
            f"sum({increase(LOST)})",
            steps=[(1, ORANGE)],
            decimals=0,
        ),
        number(
            "Counted under other",
            "Wrong replies within the time chosen above that have no series of their own: --max-series is too low, or "
            "the kernel's table was full.",
            f"sum({increase(OTHER)})",
            steps=[(1, ORANGE)],
            decimals=0,
        ),
        number(
            "Largest agent",
            "Resident memory of the agent that takes most.",
            f"max({of_agents(process('resident_memory_bytes'))})",
            "bytes",
            [(64 << 20, ORANGE), (128 << 20, RED)],
        ),
        rows(
            "Each agent",
            "mode packet reads conntrack from the packet, netlink has to ask for it, function watches conntrack's "
            "flows alone. self test: whether the last datagram of the agent's own was seen. Programs that are not "
            "attached may be ones that this kernel does not allow: udpwatch doctor.",
            LABELS,
            Column("running since", f"1000 * {per_agent(process('start_time_seconds'))}", "dateTimeAsIso", width=170),
            Column("self test", per_agent(of("self_test_passed")), "bool_yes_no", width=100),
            Column(
                "not attached",
                per_agent(f"sum by ({TARGET}) (1 - {of('probe_attached')})"),
                steps=[(1, ORANGE)],
                width=120,
            ),
            sort="not attached",
            height=8,
        ),
        Row("Do they see?"),
        lines(
            "Programs attached",
            "Share of the agents on which each program is attached. Below 100 % for ingress or egress an agent is "
            "blind; the others add what the kernel allows.",
            "percentunit",
            (f"avg by (probe) ({of('probe_attached')})", "{{probe}}"),
            top=1,
        ),
        lines(
            "Attached again",
            "Programs that somebody else had detached, within an hour: another agent on the node disturbs this one.",
            "short",
            (
                f"sum by ({WHERE}, probe) (increase({of('probe_reattached_total')}[1h])) > 0",
                f"{WHERE_LEGEND} {{{{probe}}}}",
            ),
        ),
        lines(
            "Replies checked",
            "UDP replies a second that were looked at. With traffic on the node and no reply checked the agent sees "
            "nothing.",
            "pps",
            (f"sum by ({WHERE}) ({rate(of('replies_checked_total'))})", WHERE_LEGEND),
        ),
        lines(
            "UDP sent",
            "UDP datagrams a second sent in the agent's network namespace, by the kernel's own count: the node's own, "
            "without its pods.",
            "pps",
            (f"sum by ({WHERE}) ({rate(of('udp_sent_datagrams_total'))})", WHERE_LEGEND),
        ),
        lines(
            "Flows checked",
            "New flows of conntrack in which wrong replies of machines behind the node were looked for; 0 where that "
            "is not done.",
            "cps",
            (f"sum by ({WHERE}) ({rate(of('flows_checked_total'))})", WHERE_LEGEND),
        ),
        lines(
            "Self tests failed",
            "Agents whose last test datagram was not seen by their own programs.",
            "short",
            (f"count({of('self_test_passed')} == 0) or 0 * count({AGENTS})", "agents"),
            steps=[(1, RED)],
        ),
        Row("What do they lose?"),
        lines(
            "Lost by stage",
            "rate_limit: held back on purpose. undecided, remember, flows_full, conntrack_overrun, "
            "probe_missed: wrong replies may go unseen. ring_full, findings_full, queue, output: events are lost, "
            "counts stay exact.",
            "cps",
            (f"sum by (stage) ({rate(of('events_lost_total'))}) > 0", "{{stage}}"),
            stacked=True,
        ),
        lines(
            "Lost by node",
            "Without rate_limit.",
            "cps",
            (f"sum by ({WHERE}) ({rate(LOST)}) > 0", WHERE_LEGEND),
            stacked=True,
        ),
        lines(
            "Conversations remembered",
            "At --max-peers the server port that has the most makes room, answered requests first.",
            "short",
            (f"sum by ({WHERE}) ({of('tracked_peers')})", WHERE_LEGEND),
        ),
        lines(
            "Conversations pushed out",
            "Requests that had to make room within the window. Replies that they may concern count as undecided.",
            "cps",
            (f"sum by ({WHERE}) ({rate(of('peers_evicted_total'))})", WHERE_LEGEND),
        ),
        lines(
            "Runs left out",
            "Runs of function probes that the kernel left out, since the CPU was in a probe already.",
            "cps",
            (f"sum by ({WHERE}, probe) ({rate(of('probe_missed_total'))}) > 0", f"{WHERE_LEGEND} {{{{probe}}}}"),
        ),
        lines(
            "Findings",
            "Series of wrong replies; at --max-series further ones count under other.",
            "short",
            (f'count by ({WHERE}) ({MISMATCH}{{{SCOPE}, port!="other"}})', WHERE_LEGEND),
        ),
        Row("Conntrack of the nodes"),
        lines(
            "Table used",
            "Entries in the node's conntrack table, of those that there may be. At 100 % new flows are dropped.",
            "percentunit",
            (
                f"sum by ({WHERE}) ({of('conntrack_entries')}) / sum by ({WHERE}) ({of('conntrack_limit')})",
                WHERE_LEGEND,
            ),
            steps=[(0.9, RED)],
            top=1,
        ),
        lines(
            "Dropped",
            "dropped: no room where the table is at 100 %, else mostly the races. early: unanswered entries thrown out "
            "for new ones. race: another packet booked the same flow at the same moment, two DNS questions from one "
            "socket as a rule.",
            "pps",
            (f"sum by ({WHERE}) ({rate(of('conntrack_dropped_total'))}) > 0", f"dropped, {WHERE_LEGEND}"),
            (f"sum by ({WHERE}) ({rate(of('conntrack_early_drop_total'))}) > 0", f"early, {WHERE_LEGEND}"),
            (f"sum by ({WHERE}) ({rate(of('conntrack_insert_failed_total'))}) > 0", f"race, {WHERE_LEGEND}"),
        ),
        Row("What do they cost?"),
        lines(
            "Time a run",
            f"Of each program in the kernel. {BPF_STATS}",
            "s",
            (
                f"sum by (probe) ({rate(of('probe_run_seconds_total'))})"
                f" / (sum by (probe) ({rate(of('probe_runs_total'))}) > 0)",
                "{{probe}}",
            ),
        ),
        lines(
            "CPU of the programs",
            f"In the kernel, as a share of one CPU. {BPF_STATS}",
            "percentunit",
            (f"sum by ({WHERE}) ({rate(of('probe_run_seconds_total'))})", WHERE_LEGEND),
        ),
        lines(
            "CPU of the process",
            "The agent's, as a share of one CPU.",
            "percentunit",
            (of_agents(rate(process("cpu_seconds_total"))), WHERE_LEGEND),
        ),
        lines(
            "Memory",
            "Resident, of the agent's process.",
            "bytes",
            (of_agents(process("resident_memory_bytes")), WHERE_LEGEND),
        ),
        lines(
            "Descriptors",
            "Open files and sockets, of those that the process may have.",
            "percentunit",
            (
                f"{process('open_fds')} / {process('max_fds')} and on ({TARGET}) {AGENTS}",
                WHERE_LEGEND,
            ),
            steps=[(0.8, RED)],
        ),
        lines(
            "Runs of the programs",
            f"{BPF_STATS}",
            "ops",
            (f"sum by (probe) ({rate(of('probe_runs_total'))})", "{{probe}}"),
            stacked=True,
        ),
    )
