"""Check that the programs are attached, and attach them again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from udpwatch.agent.kernel import bpf
from udpwatch.agent.kernel.cgroup import Cgroup
from udpwatch.agent.kernel.loader import Loaded
from udpwatch.agent.kernel.pins import Generation
from udpwatch.agent.kernel.probes import How
from udpwatch.agent.kernel.programs import BY_NAME, FUNCTIONS, HEAL_HOOKS, HOOKS, KEPT_SOURCES, PROGRAMS, TailCall
from udpwatch.agent.model import Probe

MODULES = Path("/sys/module")


class Attached:
    """Own the programs and links that the loader passed on. The state always comes from the kernel."""

    def __init__(self, cgroup: Cgroup, loaded: Loaded, kept: Generation | None = None) -> None:
        """``kept`` holds the pins of what outlives the agent; None: nothing does."""
        self._cgroup, self._kept = cgroup, kept
        self._programs, self._links = loaded.programs, loaded.links
        self._refused = dict(loaded.refused)
        self._instructions = loaded.instructions
        self._how = loaded.features.functions
        wanted = loaded.programs.keys() | loaded.refused.keys()
        self._hooks = {program.name: hook for program, hook in (*HOOKS, *HEAL_HOOKS) if program.name in wanted}
        self._functions = [program.name for program, _ in FUNCTIONS if program.name in wanted]
        self._reattached = dict.fromkeys(self._hooks, 0)
        # fentry keeps a function's module loaded. A kprobe does not: it silently ends when the module is unloaded.
        self._modules = {
            program.name: (function.module, _loaded_at(function.module))
            for program, function in FUNCTIONS
            if self._how[function.name] == How.KPROBE and program.name in self._links and function.module
        }

    def close(self) -> None:
        """Detach and free everything."""
        for group in (self._links, self._programs):
            for descriptor in group.values():
                os.close(descriptor)
            group.clear()

    def keep(self) -> list[str]:
        """Attach again what was detached; return a line for each change.

        A function probe whose module was unloaded stays detached: attaching it needs capabilities that were dropped.
        """
        lines = self._detach_from_unloaded_modules()
        for name, hook in self._hooks.items():
            link = self._links.get(name)
            if link is None or bpf.link_cgroup_id(link):
                continue
            if name not in self._refused:
                lines.append(f"{name} was detached from {self._cgroup.path} by another program")
            try:
                fresh = bpf.link_create(self._programs[name], self._cgroup.fd, hook.attach)
            except OSError as error:
                reason = f"cannot attach {name} again: {error.strerror}"
                if self._refused.get(name) != reason:
                    lines.append(reason)
                self._refused[name] = reason
                continue
            os.close(link)
            self._links[name] = fresh
            self._keep(name, fresh)
            self._refused.pop(name, None)
            self._reattached[name] += 1
            lines.append(f"{name} was attached again")
        return lines

    def detach(self, name: str) -> None:
        """Detach a program."""
        self.unpin(name)
        if (link := self._links.pop(name, None)) is not None:
            os.close(link)

    def free_learning(self, maps: Mapping[str, int]) -> None:
        """Free the programs that are needed only while another version's programs count."""
        for program in PROGRAMS:
            if not program.is_for_learning or (descriptor := self._programs.pop(program.name, None)) is None:
                continue
            os.close(descriptor)
            self._instructions.pop(program.name, None)
            if self._kept:
                self._kept.unpin("program", program.name)
            if isinstance(program.place, TailCall):
                bpf.map_delete(maps[program.place.map], bytes(4))

    def unpin(self, name: str) -> None:
        """Let a program end with this process."""
        if self._kept:
            self._kept.unpin("link", name)

    def _keep(self, name: str, link: int) -> None:
        program = BY_NAME[name]
        if self._kept and program.source in KEPT_SOURCES and not program.is_for_healing:
            with contextlib.suppress(OSError):  # then it ends with the agent
                self._kept.pin("link", name, link)

    def _detach_from_unloaded_modules(self) -> list[str]:
        """Detach from modules that were unloaded or reloaded; return a line for each probe."""
        lines = []
        for name, (module, loaded_at) in list(self._modules.items()):
            if _loaded_at(module) == loaded_at:
                continue
            del self._modules[name]
            os.close(self._links.pop(name))
            self._refused[name] = f"cannot probe {name} any longer: its module {module} was unloaded; restart udpwatch"
            lines.append(self._refused[name])
        return lines

    @property
    def complete(self) -> bool:
        """Whether the kernel reports every required program as attached."""
        return all(probe.attached for probe in self.probes() if probe.required)

    def probes(self) -> tuple[Probe, ...]:
        """Return every program in its current state."""
        hooks = [self._probe(name, self._is_linked(name)) for name in self._hooks]
        return (*hooks, *(self._probe(name, name in self._links) for name in self._functions))

    def unattached(self) -> dict[str, int]:
        """Return the number of instructions that the verifier walked for each program that is not attached."""
        attached = {*self._hooks, *self._functions}
        return {name: count for name, count in self._instructions.items() if name not in attached}

    def _is_linked(self, name: str) -> bool:
        link = self._links.get(name)
        return link is not None and bpf.link_cgroup_id(link) != 0

    def _probe(self, name: str, attached: bool) -> Probe:
        program = self._programs.get(name)
        info = bpf.program_info(program) if program is not None else None
        return Probe(
            name=name,
            attached=attached,
            # Without the cgroup hooks, the programs for conntrack's flows are the only source of findings.
            required=BY_NAME[name].required or (not self._hooks and BY_NAME[name].is_for_forwarded),
            reattached=self._reattached.get(name, 0),
            run_seconds=info.run_time_ns / 1e9 if info else 0.0,
            runs=info.run_count if info else 0,
            instructions=self._instructions.get(name, 0),
            reason="" if attached else self._refused.get(name, "detached"),
            how=self._how.get(name, ""),
            missed=info.missed if info else 0,
        )


def _loaded_at(module: str) -> int:
    """Return a number that differs for each time the module is loaded, 0 if it is not loaded or built in."""
    try:
        return (MODULES / module).stat().st_ino
    except OSError:
        return 0
