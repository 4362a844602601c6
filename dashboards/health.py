"""The agents dashboard: whether the agents see all replies, what they lose, and what they cost."""

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
    """Return the selector of an agent metric for the selected nodes."""
    return f"udpwatch_{name}{{{SCOPE}{', ' if matchers else ''}{matchers}}}"


def process(name: str) -> str:
    """Return the selector of a metric of the agent's process."""
    return f"process_{name}{{{SCOPE}}}"


def per_agent(expression: str) -> str:
    """Return a value for each agent, with its version, kernel and mode."""
    return f"max by ({LABELS}) ({AGENTS} * on ({TARGET}) group_left () {expression})"


LABELS = f"{WHERE}, version, kernel, mode"
#: all losses except events that the rate limit held back
LOST = of("events_lost_total", 'stage!="rate_limit"')
ATTRIBUTION = of("events_lost_total", 'stage="attribution"')
OTHER = f'{MISMATCH}{{{SCOPE}, port="other"}}'
DOWN = f'up{{job=~".*udpwatch.*", {SCOPE}}} == 0'
BPF_STATS = "Needs the sysctl kernel.bpf_stats_enabled=1, which costs some nanoseconds per run."


def dashboard() -> Dashboard:
    """Return the agents dashboard."""
    return board(
        AGENT,
        "udpwatch / Agents",
        "Whether the agents see all replies of their nodes, what they lose, and what they cost.",
        number("Agents", "Agents that Prometheus scrapes now.", f"count({AGENTS})"),
        number(
            "Down",
            "Targets that Prometheus cannot scrape, of jobs with udpwatch in their name.",
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
            "Events and replies lost within the selected time, without events that the rate limit held back.",
            f"sum({increase(LOST)})",
            steps=[(1, ORANGE)],
            decimals=0,
        ),
        number(
            "Counted under other",
            "Wrong replies within the selected time without a series of their own. --max-series is too low, or the "
            "kernel's table was full.",
            f"sum({increase(OTHER)})",
            steps=[(1, ORANGE)],
            decimals=0,
        ),
        number(
            "Largest agent",
            "Resident memory of the largest agent.",
            f"max({of_agents(process('resident_memory_bytes'))})",
            "bytes",
            [(64 << 20, ORANGE), (128 << 20, RED)],
        ),
        rows(
            "Each agent",
            "Mode packet reads conntrack's entry from the packet, netlink queries it, function watches only "
            "conntrack's flows. self test: the programs saw the last test datagram. not attached: programs that "
            "are not attached; the kernel may not allow them, see udpwatch doctor.",
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
        Row("Visibility"),
        lines(
            "Programs attached",
            "Share of the agents on which each program is attached. If ingress or egress is below 100 %, an agent is "
            "blind. The other programs are optional.",
            "percentunit",
            (f"avg by (probe) ({of('probe_attached')})", "{{probe}}"),
            top=1,
        ),
        lines(
            "Attached again",
            "Programs that were detached and attached again within an hour. Another program on the node detaches them.",
            "short",
            (
                f"sum by ({WHERE}, probe) (increase({of('probe_reattached_total')}[1h])) > 0",
                f"{WHERE_LEGEND} {{{{probe}}}}",
            ),
        ),
        lines(
            "Replies checked",
            "UDP replies checked per second. If the node sends replies and none is checked, the agent is blind.",
            "pps",
            (f"sum by ({WHERE}) ({rate(of('replies_checked_total'))})", WHERE_LEGEND),
        ),
        lines(
            "UDP sent",
            "UDP datagrams per second sent in the agent's network namespace, as the kernel counts them: those of the "
            "node without its pods.",
            "pps",
            (f"sum by ({WHERE}) ({rate(of('udp_sent_datagrams_total'))})", WHERE_LEGEND),
        ),
        lines(
            "Flows checked",
            "New flows of conntrack per second that were checked for wrong replies of machines behind the node. 0 if "
            "this check is off.",
            "cps",
            (f"sum by ({WHERE}) ({rate(of('flows_checked_total'))})", WHERE_LEGEND),
        ),
        lines(
            "Failed self-tests",
            "Agents whose programs did not see their last test datagram.",
            "short",
            (f"count({of('self_test_passed')} == 0) or 0 * count({AGENTS})", "agents"),
            steps=[(1, RED)],
        ),
        Row("Faults of the node"),
        lines(
            "Node faults",
            "Faults that the agents noticed within an hour. late_sample: too little CPU; counts stay exact. memory: "
            "less than a tenth of the memory limit was free, checked every 5 s. clock_step: the wall clock was set. "
            "suspend: the machine was suspended.",
            "short",
            (f"sum by ({WHERE}, fault) (increase({of('node_faults_total')}[1h])) > 0", f"{WHERE_LEGEND} {{{{fault}}}}"),
        ),
        lines(
            "Memory limit used",
            "Memory in use of each agent's cgroup, as a share of its limit. At 100 %, the kernel kills the agent. No "
            "data: no limit.",
            "percentunit",
            (
                f"sum by ({WHERE}) ({of('memory_used_bytes')}) / sum by ({WHERE}) ({of('memory_limit_bytes')})",
                WHERE_LEGEND,
            ),
            steps=[(0.9, RED)],
            top=1,
        ),
        lines(
            "Not watched",
            "Network namespaces and UDP sockets beyond a limit of the agent.",
            "short",
            (f"sum by ({WHERE}, kind) ({of('unwatched')})", f"{WHERE_LEGEND} {{{{kind}}}}"),
        ),
        lines(
            "Names missing",
            "Lookups per second of processes, command lines and cgroups that a limit of the agent prevented, or /proc. "
            "Their rows have the name from the kernel.",
            "cps",
            (f"sum by ({WHERE}) ({rate(ATTRIBUTION)})", WHERE_LEGEND),
        ),
        Row("Losses"),
        lines(
            "Lost by stage",
            "rate_limit: events held back on purpose. undecided, remember, flows_full, conntrack_overrun, "
            "probe_missed, unparsed: wrong replies may go unseen. ring_full, findings_full, queue, output: events are "
            "lost, counts stay exact. attribution: names are missing.",
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
            "At --max-peers, requests of the server port with the most are evicted, those with a reply first.",
            "short",
            (f"sum by ({WHERE}) ({of('tracked_peers')})", WHERE_LEGEND),
        ),
        lines(
            "Requests evicted",
            "Requests evicted within the window, per second. Replies to them count as undecided.",
            "cps",
            (f"sum by ({WHERE}) ({rate(of('peers_evicted_total'))})", WHERE_LEGEND),
        ),
        lines(
            "Skipped runs",
            "Runs of function probes that the kernel skipped because the CPU was already in a probe.",
            "cps",
            (f"sum by ({WHERE}, probe) ({rate(of('probe_missed_total'))}) > 0", f"{WHERE_LEGEND} {{{{probe}}}}"),
        ),
        lines(
            "Findings",
            "Series of wrong replies. Beyond --max-series, findings are counted under other.",
            "short",
            (f'count by ({WHERE}) ({MISMATCH}{{{SCOPE}, port!="other"}})', WHERE_LEGEND),
        ),
        Row("Conntrack"),
        lines(
            "Table used",
            "Entries in the node's conntrack table as a share of its limit. At 100 %, the node drops new flows.",
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
            "dropped: packets without an entry. At 100 %, the table is full; otherwise most of them lost a race. "
            "early: entries without a reply, evicted for new ones. race: another packet created the entry of the same "
            "flow first, usually two DNS queries from one socket.",
            "pps",
            (f"sum by ({WHERE}) ({rate(of('conntrack_dropped_total'))}) > 0", f"dropped, {WHERE_LEGEND}"),
            (f"sum by ({WHERE}) ({rate(of('conntrack_early_drop_total'))}) > 0", f"early, {WHERE_LEGEND}"),
            (f"sum by ({WHERE}) ({rate(of('conntrack_insert_failed_total'))}) > 0", f"race, {WHERE_LEGEND}"),
        ),
        Row("Cost"),
        lines(
            "Time per run",
            f"Time of each program in the kernel. {BPF_STATS}",
            "s",
            (
                f"sum by (probe) ({rate(of('probe_run_seconds_total'))})"
                f" / (sum by (probe) ({rate(of('probe_runs_total'))}) > 0)",
                "{{probe}}",
            ),
        ),
        lines(
            "CPU of the programs",
            f"CPU time of the programs in the kernel, as a share of one CPU. {BPF_STATS}",
            "percentunit",
            (f"sum by ({WHERE}) ({rate(of('probe_run_seconds_total'))})", WHERE_LEGEND),
        ),
        lines(
            "CPU of the agent",
            "CPU time of the agent's process, as a share of one CPU.",
            "percentunit",
            (of_agents(rate(process("cpu_seconds_total"))), WHERE_LEGEND),
        ),
        lines(
            "Memory",
            "Resident memory of the agent's process.",
            "bytes",
            (of_agents(process("resident_memory_bytes")), WHERE_LEGEND),
        ),
        lines(
            "Descriptors",
            "Open files and sockets as a share of the process's limit.",
            "percentunit",
            (
                f"{process('open_fds')} / {process('max_fds')} and on ({TARGET}) {AGENTS}",
                WHERE_LEGEND,
            ),
            steps=[(0.8, RED)],
        ),
        lines(
            "Runs of the programs",
            f"Runs of each program per second. {BPF_STATS}",
            "ops",
            (f"sum by (probe) ({rate(of('probe_runs_total'))})", "{{probe}}"),
            stacked=True,
        ),
    )
