"""Run the loading child, the only module that imports bcc. loader.py starts it; it exits after its answer.

python3 -m udpwatch.agent.kernel.loader_child FD
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import inspect
import json
import os
import resource
import socket
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from udpwatch.agent import __version__
from udpwatch.agent.errors import CannotRun, UdpwatchError
from udpwatch.agent.kernel import capabilities, clock, features, map_types, netns, objects, pin_check, records
from udpwatch.agent.kernel.bpf import (
    AttachType,
    MapDefinition,
    ProgramType,
    is_forbidden,
    iterator_attach,
    iterator_read,
    link_create,
    map_create,
    map_definition,
    map_update,
    program_load_logged,
)
from udpwatch.agent.kernel.libbpf import Btf
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.kernel.objects import CompileCache, Object, name_maps
from udpwatch.agent.kernel.pins import Generation, Pins
from udpwatch.agent.kernel.probes import How, Target, argument_indices
from udpwatch.agent.kernel.programs import (
    FUNCTIONS,
    HEAL_HOOKS,
    HOOKS,
    ITERATORS,
    KEPT_SOURCES,
    KEYS,
    LEARNING_HOOKS,
    LOCKED,
    MAPS,
    OF_SOCKETS,
    ON_DEMAND,
    PROGRAMS,
    TAIL_CALLS,
    Hook,
    Iterator,
    Program,
)
from udpwatch.agent.kernel.rlimits import raise_memory_lock_limit
from udpwatch.agent.model import Hooks

SOURCES = Path(__file__).resolve().parents[2] / "bpf"
#: what a generation has only before, or only after it has learned
TEMPORARY = (
    ("link", "egress"),
    ("link", "egress_learning"),
    *(("program", program.name) for program in PROGRAMS if program.is_for_learning),
)
MANIFEST_FORMAT = 1
DIGEST_CHARACTERS = 32
LEARN_MORE_NS = 1_000_000_000  # than one window: the clock of the conversations is coarse
MAX_LOCAL = 32_896  # addresses of all healed namespaces, which agent/heal/namespaces.py shares out
ADOPT_SECONDS = 2.0  # to find the sockets of other namespaces


def _import_bcc() -> Any:
    try:
        import bcc  # noqa: PLC0415 imported late, because it may be missing

        bcc.BPF.load_func  # noqa: B018 an empty folder of that name can be imported too
    except (ImportError, AttributeError) as error:
        raise CannotRun(
            f"cannot import bcc: {error}; install python3-bpfcc and run udpwatch with the system's Python "
            "(a virtual environment needs --system-site-packages)"
        ) from None
    if "attach_type" not in inspect.signature(bcc.BPF.load_func).parameters:
        raise CannotRun(
            f"cannot use bcc {bcc.__version__}: it is too old for sendmsg programs; install bcc 0.25 or newer"
        )
    return bcc


def _constants(request: dict[str, Any], found: features.Features) -> dict[str, object]:
    """Return the constants that the source files are compiled with."""
    limits = Limits(**request["limits"])
    return {
        "WINDOW_NS": f"{limits.window_ns}ULL",
        "SETS": max(1, limits.max_peers // records.WAYS),
        # On average, one in 256 conversations may ask several addresses at a time.
        "ADDRESS_SETS": max(1, limits.max_peers // 256),
        "ADDRESS_SHARE": max(1, limits.max_peers // 256 // 8),
        "FINGERPRINT_SETS": max(1, limits.max_peers // 4),
        "MAX_EVICTIONS": 4096,
        "MAX_LOCAL": MAX_LOCAL,
        "REQUEST_SETS": max(1, limits.max_peers // 4 // records.WAYS),
        # Without conntrack's entry, each suspected conversation has an element of its own until conntrack is asked.
        "MAX_FINDINGS": limits.max_findings if found.conntrack else max(limits.max_findings, limits.max_peers // 2),
        "MAX_TENANTS": 4096,
        "SERVERS": limits.max_servers + records.FIRST_SLOT,
        "MAX_CANDIDATES": limits.max_candidates,
        "MAX_REPORTED": limits.max_reported,
        "EVENTS_PER_SECOND": limits.events_per_second,
        "RING_PAGES": limits.ring_pages,
        "TICK_NS": f"{records.tick_ns()}ULL",
        "PAGE_SIZE": os.sysconf("SC_PAGE_SIZE"),
        "NOTE_REPORTED": int(request["forwarded"]),
        "FORWARDED": int(request["forwarded"]),
        "HEALING": int(request["heal"]),
        "HAVE_SOCKETS": int(request["hooks"] != Hooks.FUNCTION),
        "HAVE_NETNS_COOKIE": int(found.netns_cookie),
        "HAVE_CURRENT": int(found.current),
        "HAVE_CURRENT_COMM": int(found.current_comm),
        "HAVE_CURRENT_TASK": int(found.current_task),
        "HAVE_SENDER_COMM": int(found.sender_comm),
        "HAVE_KERNEL_READ": int(found.conntrack),
        **{
            f"{program.function.upper()}_ARGUMENT_{number}": index
            for program, function in FUNCTIONS
            for number, index in enumerate(argument_indices(found.functions[function.name]))
        },
        **found.offsets,
        **found.flow_offsets,
        **found.socket_offsets,
        **found.address_offsets,
        "INET_FLAGS_TRANSPARENT": 15,  # include/net/inet_sock.h, since Linux 6.6
    }


def _compile(source: str, constants: Mapping[str, object]) -> Object:
    """Compile a source file with bcc. Raises CannotRun without bcc, and UdpwatchError if it does not compile."""
    bcc = _import_bcc()
    # bcc takes kernel headers from here; ours are tiny stand-ins (bpf/include/README.md).
    os.environ["BCC_KERNEL_SOURCE"] = str(SOURCES)
    # bcc 0.31 sets -fcf-protection on x86, which clang refuses for another ARCH; BPF has no such thing.
    flags = [f"-I{SOURCES}", "-fcf-protection=none", *(f"-D{name}={value}" for name, value in constants.items())]
    try:
        module = bcc.BPF(src_file=str(SOURCES / source), cflags=flags)
    except Exception as error:  # bcc raises a plain Exception and prints the reason
        output = _compiler_error()
        hint = _likely_cause(errno.EPERM) if os.strerror(errno.EPERM) in output else ""
        raise UdpwatchError(f"cannot compile {source} or create its maps: {error}{output}{hint}") from None
    lib = bcc.libbcc.lib
    lib.bpf_table_name.restype, lib.bpf_table_name.argtypes = ctypes.c_char_p, (ctypes.c_void_p, ctypes.c_size_t)
    lib.bpf_table_fd_id.restype, lib.bpf_table_fd_id.argtypes = ctypes.c_int, (ctypes.c_void_p, ctypes.c_size_t)
    lib.bpf_num_tables.restype, lib.bpf_num_tables.argtypes = ctypes.c_size_t, (ctypes.c_void_p,)
    # bcc created maps in order to compile. They go with it, and the loader creates its own.
    tables = {
        lib.bpf_table_fd_id(module.module, number): lib.bpf_table_name(module.module, number).decode()
        for number in range(lib.bpf_num_tables(module.module))
    }
    indices = {fd: index for index, fd in enumerate(tables)}
    programs = [lib.bpf_function_name(module.module, n) for n in range(lib.bpf_num_functions(module.module))]
    compiled = Object(
        compiler=f"bcc {bcc.__version__}",
        maps=tuple(map_definition(fd, name) for fd, name in tables.items()),
        programs={name.decode(): name_maps(module.dump_func(name), indices) for name in programs},
    )
    module.cleanup()
    return compiled


def _compiler_error() -> str:
    """Return the first error that the compiler printed; stderr is a file (loader.py)."""
    stderr = sys.stderr.fileno()
    output = os.pread(stderr, os.fstat(stderr).st_size, 0).decode(errors="replace")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line] or lines[-1:]
    return f" ({errors[0]})" if errors else ""


def _attach(name: str, hook: Hook, program: int, cgroup: int, path: str) -> int:
    try:
        return link_create(program, cgroup, hook.attach)
    except OSError as error:
        reason = f"cannot attach {name} to {path}: {errno.errorcode.get(error.errno or 0, '?')}"
        if error.errno == errno.EPERM and capabilities.may_load(capabilities.effective()):
            reason += (
                ": another program holds this hook exclusively (Cilium upgraded from before 1.14 does); "
                "see docs/kernels.md"
            )
        elif error.errno == errno.EPERM:
            reason += ": CAP_NET_ADMIN is missing"
        raise UdpwatchError(reason) from None


class _Answer:
    """The answer to the agent: descriptors with their names, and why others are missing."""

    def __init__(self) -> None:
        self.names: list[tuple[str, str]] = []
        self.descriptors: list[int] = []
        self.refused: dict[str, str] = {}
        self.instructions: dict[str, int] = {}

    def add(self, kind: str, name: str, descriptor: int) -> None:
        self.names.append((kind, name))
        self.descriptors.append(descriptor)


def _obtain(source: str, request: dict[str, Any], constants: Mapping[str, object]) -> Object:
    """Return the object of a source file, from the cache or compiled now."""
    cache = CompileCache(Path(request["cache"]) if request["cache"] else None)
    key = objects.key(SOURCES, source, constants)
    compiled = cache.get(key)
    if compiled is None:
        compiled = _compile(source, constants)
        cache.put(key, compiled)
    return compiled


def _create(definition: MapDefinition) -> int:
    if definition.name in LOCKED | OF_SOCKETS:
        return map_types.create(definition, definition.name in LOCKED)
    created = map_create(definition)
    if definition.name in KEYS:
        map_update(created, bytes(definition.key_bytes), os.urandom(definition.value_bytes))
    return created


def _link(compiled: Object, maps: dict[str, int]) -> dict[str, bytes]:
    """Create the missing maps of an object; return the loadable instructions of each program.

    ``maps`` (name -> descriptor) holds the maps of other objects and gets the new ones: maps of one name are one map.
    """
    for definition in compiled.maps:
        if definition.name not in maps:
            try:
                maps[definition.name] = _create(definition)
            except OSError as error:
                raise UdpwatchError(f"cannot create the map {definition.name}: {_reason(error)}") from None
    numbers = dict(enumerate(maps[definition.name] for definition in compiled.maps))
    return {name: name_maps(code, numbers) for name, code in compiled.programs.items()}


def _load(
    program: Program, type_: ProgramType, attach: AttachType | None, code: dict[str, bytes], answer: _Answer
) -> int:
    name = program.name
    try:
        descriptor, answer.instructions[name] = program_load_logged(type_, attach, code[program.function], name)
    except OSError as error:
        if error.errno == errno.EACCES and not capabilities.may_read_memory(capabilities.effective()):
            raise CannotRun(
                f"cannot load the program {name}: this kernel requires CAP_PERFMON ({error.strerror}); add CAP_PERFMON"
            ) from None
        raise UdpwatchError(f"cannot load the program {name}: {_reason(error)}") from None
    answer.add("program", name, descriptor)
    return descriptor


def _load_on_demand(source: str, code: dict[str, bytes], answer: _Answer) -> None:
    for program, place in ON_DEMAND:
        if program.source == source:
            _load(program, place.type, None, code, answer)


def _load_hooks(code: dict[str, bytes], maps: dict[str, int], request: dict[str, Any], answer: _Answer) -> None:
    # Load these first: the hooks call them.
    for program, call in TAIL_CALLS:
        if (program.is_for_healing and not request["heal"]) or (program.is_for_learning and not request["learning"]):
            continue
        try:
            descriptor = _load(program, call.type, call.attach, code, answer)
        except UdpwatchError as error:
            if not program.is_for_healing:
                raise
            answer.refused[program.name] = str(error)
            continue
        map_update(maps[call.map], bytes(4), struct.pack("=I", descriptor))
    _load_on_demand("sockets.c", code, answer)
    _attach_hooks("sockets.c", code, request, answer)


def _attach_hooks(source: str, code: dict[str, bytes], request: dict[str, Any], answer: _Answer) -> None:
    for program, hook in (*HOOKS, *HEAL_HOOKS, *(LEARNING_HOOKS if request["learning"] else ())):
        if program.source != source:
            continue
        try:
            descriptor = _load(program, hook.type, hook.attach, code, answer)
            if program.name == "egress" and request["learning"]:
                continue  # handover.py puts it in the place of the other version's
            link = _attach(program.name, hook, descriptor, request["cgroup"], request["path"])
            answer.add("link", program.name, link)
        except UdpwatchError as error:
            if program.required:
                raise
            answer.refused[program.name] = str(error)


def _without_healing(found: features.Features) -> str:
    """Return why nothing can be healed on this kernel; "": it can."""
    if found.address_reason:
        return found.address_reason
    if not {"OFFSET_INET_FLAGS", "BIT_INET_TRANSPARENT"} & found.socket_offsets.keys():
        return "this kernel does not tell which sockets are transparent"
    return ""


def _load_heal(maps: dict[str, int], request: dict[str, Any], constants: Mapping[str, object], answer: _Answer) -> None:
    """Load what heals replies; if that fails, note why."""
    try:
        if reason := answer.refused.get("egress_healed"):  # nobody would count what is healed
            raise UdpwatchError(reason)
        code = _link(_obtain("heal.c", request, constants), maps)
    except UdpwatchError as error:
        answer.refused |= {program.name: str(error) for program, _ in HEAL_HOOKS}
        return
    _attach_hooks("heal.c", code, request, answer)


def _load_inventory(
    request: dict[str, Any], constants: Mapping[str, object], maps: dict[str, int], answer: _Answer
) -> str:
    """Load what lists sockets, and note the sockets that exist already. Return the name of the compiler.

    No part of it is required.
    """
    compiled = _obtain("inventory.c", request, constants)
    code = _link(compiled, maps)
    links = dict[str, int]()
    for program, iterator in ITERATORS:
        try:
            descriptor = _load_iterator(program, iterator, code, Path(request["btf"]), answer)
            links[program.name] = iterator_attach(descriptor, maps.get(iterator.map))
            answer.add("link", program.name, links[program.name])
        except (OSError, LookupError, UdpwatchError) as error:
            answer.refused[program.name] = f"cannot load the iterator {program.name}: {error.args[-1]}"
    if request["cgroup"] >= 0 and "noted_sockets" in links:
        _attach_hooks("inventory.c", code, request, answer)
        if "adopt_sockets" in links:
            _adopt_sockets(links["adopt_sockets"])
    return compiled.compiler


def _load_iterator(program: Program, place: Iterator, code: dict[str, bytes], btf: Path, answer: _Answer) -> int:
    with contextlib.closing(Btf(btf)) as types:
        function = types.function(place.target)
    name = program.name
    descriptor, answer.instructions[name] = program_load_logged(
        ProgramType.TRACING, AttachType.TRACE_ITER, code[program.function], name, (function, 0)
    )
    answer.add("program", name, descriptor)
    return descriptor


def _adopt_sockets(link: int) -> None:
    """Note the sockets of all namespaces that can be entered."""
    until = time.monotonic() + ADOPT_SECONDS
    with contextlib.suppress(OSError):  # too many open files
        for fd in netns.everywhere(thorough=True):
            with contextlib.suppress(OSError), netns.entered(fd):
                for _piece in iterator_read(link):
                    pass
            if time.monotonic() > until:
                return


def _load_probes(code: dict[str, bytes], request: dict[str, Any], found: features.Features, answer: _Answer) -> None:
    alone = request["hooks"] == Hooks.FUNCTION
    for program, function in FUNCTIONS:
        name, how = program.name, found.functions[function.name]
        if not how:
            if not program.is_for_forwarded:  # those are reported once, with the flows
                answer.refused[name] = f"cannot probe {name}: {found.functions_reason[function.name]}"
            continue
        if program.is_for_forwarded and not request["forwarded"] and not alone:
            continue
        try:
            with Target(function, How(how), Path(request["btf"])) as target:
                descriptor, answer.instructions[name] = target.load(code[program.function], program.function)
                answer.add("program", name, descriptor)
                answer.add("link", name, target.attach(descriptor))
        except (OSError, LookupError) as error:
            answer.refused[name] = f"cannot probe {name} by {how}: {error.args[-1]}"
    if found.flow_probes:
        _load_on_demand("conntrack.c", code, answer)


def _reason(error: OSError) -> str:
    """Return the error text of the kernel with its likely cause."""
    return (error.strerror or "refused") + _likely_cause(error.errno)


def _likely_cause(number: int | None) -> str:
    """Return the likely cause of an errno of bpf(2), or ""."""
    if number != errno.EPERM:
        return ""
    if capabilities.may_load(capabilities.effective()) and is_forbidden():
        return (
            "; a seccomp profile forbids bpf(2), as the default profiles of podman, CRI-O and "
            "Docker before 23.0 do: see docs/docker.md"
        )
    # main() could not raise the limit.
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        return (
            "; before Linux 5.11, programs and maps count as locked memory: add CAP_SYS_RESOURCE or raise the limit "
            "(systemd: LimitMEMLOCK=infinity)"
        )
    return ""


def _probe(request: dict[str, Any]) -> features.Features:
    try:
        return features.probe(Path(request["btf"]))
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise CannotRun(f"cannot load BPF programs: {_reason(error)}") from None
        raise CannotRun(
            f"cannot load cgroup_skb programs: {error.strerror}; use a kernel with CONFIG_CGROUP_BPF"
        ) from None


def _digest(request: dict[str, Any], constants: Mapping[str, object]) -> str:
    """Return the name of what is loaded: everything that it is made of, and where it is attached."""
    parts = [objects.key(SOURCES, source, constants) for source in KEPT_SOURCES]
    parts += [str(request[name]) for name in ("hooks", "heal", "cgroup_id")]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:DIGEST_CHARACTERS]


def _choose_before(pins: Pins, digest: str, cgroup_id: int) -> Generation | None:
    """Return the generation that counts now, or whose counts wait to be read; None: there is only that of ``digest``,
    or none. Remove the others, which never counted: agents were killed while these were loaded or learned. Remove also
    those that watch another cgroup, whose links are of no use here.
    """
    before: list[Generation] = []
    for each in pins.generations():
        if each.digest == digest and each.manifest():
            continue
        if each.digest != digest and each.has_counted(cgroup_id) and each.manifest():
            before.append(each)
        else:
            each.remove()
    before.sort(key=lambda each: each.counts)
    for each in before[:-1]:
        each.remove()
    return before[-1] if before else None


def _find_kept(request: dict[str, Any], constants: Mapping[str, object]) -> tuple[Generation, dict[str, Any]]:
    """Return the generation to load or to take over, and what the agent is told of it."""
    pins, digest = Pins.inherited(request["state"]), _digest(request, constants)
    before = _choose_before(pins, digest, request["cgroup_id"])
    request["learning"] = before is not None and before.counts
    return pins.generation(digest), {"digest": digest, "before": before.digest if before else "", "resumed": False}


def _resume(
    kept: Generation, request: dict[str, Any], constants: Mapping[str, object], about: dict[str, Any]
) -> tuple[_Answer, dict[str, int], str] | None:
    """Take over a generation; return what was loaded, its maps and its compiler. None: it is missing; or damaged, and
    removed now, which ``about`` then says.
    """
    described = kept.manifest()
    answer, maps = _Answer(), dict[str, int]()
    if described is None:
        return None
    try:
        for kind, name in described["names"]:
            if kind == "map":
                maps[name] = kept.get(kind, name)
            elif (kind, name) not in TEMPORARY:
                answer.add(kind, name, kept.get(kind, name))
        for kind, name in TEMPORARY:
            with contextlib.suppress(FileNotFoundError):
                answer.add(kind, name, kept.get(kind, name))
        _check(answer, maps, request, constants, bool(about["before"]))
        about["learns_until"] = int(described["learns_until"])
        answer.refused |= {str(name): str(reason) for name, reason in described["refused"].items()}
        there = {name for kind, name in answer.names if kind == "program"}
        counts = {str(name): int(count) for name, count in described["instructions"].items()}
        answer.instructions |= {name: count for name, count in counts.items() if name in there}
        return answer, maps, str(described["compiler"])
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        for descriptor in (*maps.values(), *answer.descriptors):
            os.close(descriptor)
        about["removed"] = f"{error.args[0]} is missing" if isinstance(error, LookupError) else str(error)
        kept.remove()
        return None


def _check(
    taken: _Answer,
    maps: dict[str, int],
    request: dict[str, Any],
    constants: Mapping[str, object],
    is_switching: bool,
) -> None:
    """Raise OSError, LookupError or ValueError unless a generation is complete and what would be loaded."""
    compiled = _obtain("sockets.c", request, constants)
    definitions = {each.name: each for each in compiled.maps}
    if maps.keys() - definitions.keys():  # those of inventory.c, if this kernel has what that needs
        definitions |= {each.name: each for each in _obtain("inventory.c", request, constants).maps}
    pin_check.check_maps(maps, definitions.values())
    groups: dict[str, dict[str, int]] = {"program": {}, "link": {}}
    for (kind, name), descriptor in zip(taken.names, taken.descriptors, strict=True):
        groups[kind][name] = descriptor
    for program in PROGRAMS:
        if program.source != "sockets.c" or program.is_for_healing or program.is_for_learning:
            continue
        is_hook = isinstance(program.place, Hook)
        if (program.required or not is_hook) and program.name not in groups["program"]:
            raise LookupError(f"the program {program.name}")
        if program.required and program.name not in groups["link"] and not (program.name == "egress" and is_switching):
            raise LookupError(f"the link {program.name}")
    if request["learning"] and not all("egress_learning" in group for group in groups.values()):
        raise LookupError("egress_learning")  # so it does not know what was answered
    pin_check.check_programs(groups["program"], groups["link"], maps, request["cgroup_id"], is_switching)


def _keep(kept: Generation, request: dict[str, Any], maps: dict[str, int], answer: _Answer, compiler: str) -> str:
    """Pin everything that was loaded so far. Return why that failed; "": it did not."""
    # Links last: what is attached is complete.
    loaded = sorted(zip(answer.names, answer.descriptors, strict=True), key=lambda each: each[0][0] == "link")
    objects_ = [*((("map", name), descriptor) for name, descriptor in maps.items()), *loaded]
    manifest = {
        "format": MANIFEST_FORMAT,
        "version": __version__,
        "names": [name for name, _ in objects_],
        "limits": request["limits"],
        "layout": records.layout(),
        "refused": answer.refused,
        "instructions": answer.instructions,
        "learns_until": request["learns_until"],
        "compiler": compiler,
    }
    try:
        for (kind, name), descriptor in objects_:
            kept.pin(kind, name, descriptor)
        kept.write_manifest(manifest)
    except OSError as error:
        with contextlib.suppress(OSError):
            kept.remove()
        return error.strerror or "refused"
    return ""


def _serve(request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    found = _probe(request)
    hooks = Hooks(request["hooks"])
    if hooks is Hooks.FUNCTION and not found.flow_probes:
        raise CannotRun(f"cannot probe functions: {found.probes_reason}; use --hooks all")
    heal_reason = _without_healing(found) if request["heal"] else ""
    request["heal"] = request["heal"] and not heal_reason
    request["learning"] = False  # unless another version's programs count
    constants = _constants(request, found)
    answer, maps, about, compiler = _Answer(), dict[str, int](), dict[str, Any](), ""
    if request["only_inventory"]:
        if not found.socket_offsets:
            raise CannotRun(f"cannot list sockets by BPF: {found.sockets_reason}")
        compiler = _load_inventory(request, constants, maps, answer)
        return _content(answer, found, compiler, about), answer.descriptors
    kept = None
    try:
        if request["state"] >= 0 and hooks is Hooks.FUNCTION:
            for each in Pins.inherited(request["state"]).generations():  # these settings want no cgroup hooks
                each.remove()
        elif request["state"] >= 0:
            kept, about = _find_kept(request, constants)
            if taken := _resume(kept, request, constants, about):
                answer, maps, compiler = taken
                about["resumed"] = True
    except OSError as error:
        raise UdpwatchError(
            f"cannot remove what is pinned in the state folder: {error.strerror}: {error.filename}; remove it with "
            "udpwatch detach"
        ) from None
    if not compiler:
        compiler = _load_unbound(found, request, constants, maps, answer)
        if kept:
            learns = request["limits"]["window_ns"] + LEARN_MORE_NS if request["learning"] else 0
            about["learns_until"] = request["learns_until"] = clock.monotonic_ns() + learns if learns else 0
            about["unpinned"] = _keep(kept, request, maps, answer, compiler)
    read = _load_bound(found, request, constants, maps, answer)
    if heal_reason:
        answer.refused |= {program.name: heal_reason for program, _ in HEAL_HOOKS}
    for name in sorted(read):
        answer.add("map", name, maps[name])
    return _content(answer, found, compiler, about), answer.descriptors


def _load_unbound(
    found: features.Features,
    request: dict[str, Any],
    constants: Mapping[str, object],
    maps: dict[str, int],
    answer: _Answer,
) -> str:
    """Load what may outlive the agent. Return the name of the compiler."""
    compiler = _load_inventory(request, constants, maps, answer) if found.socket_offsets else ""
    if request["hooks"] == Hooks.FUNCTION:
        return compiler or _obtain("conntrack.c", request, constants).compiler
    compiled = _obtain("sockets.c", request, constants)
    _load_hooks(_link(compiled, maps), maps, request, answer)
    return compiled.compiler


def _load_bound(
    found: features.Features,
    request: dict[str, Any],
    constants: Mapping[str, object],
    maps: dict[str, int],
    answer: _Answer,
) -> set[str]:
    """Load what ends with the agent: what heals, and function probes. Return the maps that the agent reads."""
    read = set[str]()
    if request["hooks"] != Hooks.FUNCTION:
        read |= MAPS["sockets.c"]
        if request["heal"]:
            _load_heal(maps, request, constants, answer)
            read |= MAPS["heal.c"] & maps.keys()
    if request["hooks"] != Hooks.CGROUP and any(found.functions.values()):
        _load_probes(_link(_obtain("conntrack.c", request, constants), maps), request, found, answer)
        read |= MAPS["conntrack.c"]
    return read


def _content(answer: _Answer, found: features.Features, compiler: str, about: dict[str, Any]) -> dict[str, Any]:
    return {
        "kept": about,
        "descriptors": answer.names,
        "features": asdict(found),
        "refused": answer.refused,
        "instructions": answer.instructions,
        "compiler": compiler,
    }


def main() -> None:
    """Answer one request and exit without bcc's clean-up, which takes time and detaches nothing."""
    raise_memory_lock_limit()
    channel = socket.socket(fileno=int(sys.argv[1]))
    request = json.loads(channel.recv(1 << 16))
    try:
        answer, descriptors = _serve(request)
    except UdpwatchError as error:
        answer = {"error": str(error), "cannot_run": isinstance(error, CannotRun)}
        descriptors = []
    socket.send_fds(channel, [json.dumps(answer).encode()], descriptors)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
