"""Check what is taken over from a state folder (pins.py), before it is used.

The folder belongs to root, so this is about damage, and about tools that pin and attach: the kernel copies as many
bytes as a map's elements have, whatever the reader expects, and a program counts in its own maps, whatever is pinned
beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from udpwatch.agent.kernel import bpf
from udpwatch.agent.kernel.bpf import MapDefinition
from udpwatch.agent.kernel.programs import BY_NAME, Hook, Iterator, TailCall
from udpwatch.agent.kernel.records import Layout

#: map -> (size of its key in bytes or the struct, the struct of its value): what is read of another version
_READ: dict[str, tuple[int | str, str]] = {
    "findings": ("finding_key", "finding"),
    "servers": ("server_key", "server"),
    "server_counts": (4, "server_counts"),
    "waiting": (4, "waiting"),
    "counters": (4, "stats"),
}
#: the same, of maps whose elements are numbers
_NUMBERS = {"findings_beyond": (8, 8), "findings_held": (8, 8), "servers_held": (8, 8), "free_slots": (0, 4)}
_NUMBERS |= dict.fromkeys(("all_findings", "all_servers"), (4, 8))
_TYPES = {"events": 27, "free_slots": 22}  # BPF_MAP_TYPE_RINGBUF, BPF_MAP_TYPE_QUEUE


def check_maps(maps: Mapping[str, int], definitions: Iterable[MapDefinition]) -> None:
    """Raise ValueError unless each pinned map is like the one that would be created, and LookupError if one is missing.
    Raises OSError if something else than a map is pinned.
    """
    for wanted in definitions:
        if wanted.name not in maps:
            raise LookupError(f"the map {wanted.name}")
        if bpf.map_definition(maps[wanted.name], wanted.name) != wanted:
            raise ValueError(f"the map {wanted.name} is another one")


def check_layout(maps: Mapping[str, int], layout: Layout) -> None:
    """Raise ValueError unless the elements of another version's maps have the sizes that it described."""
    sizes = dict[str, tuple[int, int]](_NUMBERS)
    for name, (key, value) in _READ.items():
        sizes[name] = (layout.size(key) if isinstance(key, str) else key, layout.size(value))
    for name, (key_bytes, value_bytes) in sizes.items():
        found = bpf.map_definition(maps[name], name)
        if (found.key_bytes, found.value_bytes) != (key_bytes, value_bytes):
            raise ValueError(f"the map {name} has elements of another size")
    for name, kind in _TYPES.items():
        if bpf.map_definition(maps[name], name).type != kind:
            raise ValueError(f"the map {name} is of another type")


def check_programs(
    programs: Mapping[str, int], links: Mapping[str, int], maps: Mapping[str, int], cgroup_id: int, is_switching: bool
) -> None:
    """Raise ValueError unless each program is of its type and uses the pinned maps, and each link runs its program on
    the watched cgroup. Raises OSError if something else is pinned.

    ``is_switching``: the link `egress` may still run another version's program (handover.py).
    """
    ids = {bpf.map_id(descriptor) for descriptor in maps.values()}
    for name, descriptor in programs.items():
        place = BY_NAME[name].place
        if isinstance(place, Hook | TailCall) and bpf.program_type(descriptor) != place.type:
            raise ValueError(f"the program {name} is another one")
        if bpf.program_info(descriptor).name != name[:15] or not bpf.program_maps(descriptor) <= ids:
            raise ValueError(f"the program {name} is another one")
    for name, descriptor in links.items():
        place = BY_NAME[name].place
        if is_switching and name == "egress":
            continue
        if bpf.link_program_id(descriptor) != bpf.program_info(programs[name]).id:
            raise ValueError(f"the link {name} runs another program")
        # 0: it was detached, and is attached again.
        if not isinstance(place, Iterator) and bpf.link_cgroup_id(descriptor) not in (0, cgroup_id):
            raise ValueError(f"the link {name} is attached to another cgroup")
