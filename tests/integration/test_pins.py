"""Whatever is in the state folder, the agent starts, counts right, and says what it did."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
from pathlib import Path

import pytest
from agents import Agent, run_cli
from wrong_replies import wrong_replies

from udpwatch.agent.kernel import bpf
from udpwatch.agent.kernel.bpf import AttachType, MapDefinition, ProgramType
from udpwatch.agent.testing.lab import ContainerHost

ACCEPT = bytes.fromhex("b7000000010000009500000000000000")  # r0 = 1; exit
NOBODY = 65_534


def counts_and_says(host: ContainerHost, folder: Path, port: int, state: Path, *expected: str, before: int = 0) -> None:
    """Run an agent: it counts wrong replies after ``before`` ones, and its log has ``expected``."""
    with Agent(folder, f"--state={state}") as agent:
        assert not [line for line in agent.log if "Traceback" in line]
        for text in expected:
            assert any(text in line for line in agent.log), (text, agent.log)
        wrong_replies(host, port, 5)
        assert agent.counted(port, before + 5) == before + 5
        assert agent.stop() == 0


def left_by_an_agent(host: ContainerHost, folder: Path, port: int, state: Path) -> Path:
    """Return the generation that an agent has pinned; it counted 5 wrong replies."""
    counts_and_says(host, folder, port, state)
    (manifest,) = state.glob("*/manifest")
    return manifest.parent


def put(definition: MapDefinition, path: Path, value: bytes = b"") -> None:
    """Pin a new map, with a value under key 0."""
    path.unlink(missing_ok=True)
    fd = bpf.map_create(definition)
    if value:
        bpf.map_update(fd, bytes(4), value.ljust(definition.value_bytes, b"\0"))
    bpf.pin(fd, path)
    os.close(fd)


def put_program(type_: ProgramType, attach: AttachType | None, path: Path, name: str) -> None:
    """Pin a new program, which accepts everything."""
    path.unlink()
    fd = bpf.program_load(type_, attach, ACCEPT, name)
    bpf.pin(fd, path)
    os.close(fd)


def array(size: int) -> MapDefinition:
    """The parameters of an array with one element."""
    return MapDefinition("unrelated", 2, 4, size, 1, 0)


def test_folder_of_another_user_is_refused(host: ContainerHost, folder: Path, port: int, state: Path) -> None:
    """As where /sys/fs/bpf has mode 1777."""
    state.mkdir()
    os.chown(state, NOBODY, NOBODY)
    counts_and_says(host, folder, port, state, f"it belongs to user {NOBODY}")
    assert not list(state.iterdir())
    done = run_cli("detach", f"--state={state}")
    assert done.returncode == 1 and f"it belongs to user {NOBODY}" in done.stderr


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_folder_that_others_can_write_to_is_refused(
    host: ContainerHost, folder: Path, port: int, state: Path, mode: int
) -> None:
    state.mkdir()
    state.chmod(mode)
    counts_and_says(host, folder, port, state, "others can write to it")
    assert not list(state.iterdir())


def test_symbolic_link_is_refused(host: ContainerHost, folder: Path, port: int, state: Path) -> None:
    elsewhere = state.with_name("elsewhere")
    elsewhere.mkdir(0o700)
    state.symlink_to(elsewhere)
    counts_and_says(host, folder, port, state, "it is a symbolic link")
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("exists", [True, False])
def test_folder_outside_of_a_bpffs_is_refused(
    host: ContainerHost, folder: Path, port: int, tmp_path: Path, exists: bool
) -> None:
    state = tmp_path / "udpwatch" if exists else tmp_path / "missing/udpwatch"
    counts_and_says(host, folder, port, state, "cannot use the state folder", "mount -t bpf bpf /sys/fs/bpf")


def test_second_agent_is_refused(host: ContainerHost, folder: Path, port: int, state: Path) -> None:
    with Agent(folder, f"--state={state}") as agent:
        done = run_cli("run", f"--state={state}", "--metrics-listen=off", "--socket=off")
        assert done.returncode == 1 and "another agent uses it" in done.stderr
        done = run_cli("detach", f"--state={state}")
        assert done.returncode == 1 and "another agent uses it" in done.stderr
        wrong_replies(host, port, 5)
        assert agent.counted(port, 5) == 5


@pytest.mark.parametrize(
    ("name", "definition"),
    [
        ("findings", MapDefinition("findings", 1, 8, 8, 16, 0)),
        ("server_counts", array(1 << 20)),
        ("events", array(8)),
    ],
)
def test_unrelated_map_in_place_of_ours(
    host: ContainerHost, folder: Path, port: int, state: Path, name: str, definition: MapDefinition
) -> None:
    generation = left_by_an_agent(host, folder, port, state)
    put(definition, generation / "maps" / name)
    counts_and_says(host, folder, port, state, f"the map {name} is another one", "loaded anew", before=5)
    counts_and_says(host, folder, port, state, "goes on with the counts", before=10)


def test_another_map_of_the_same_definition(host: ContainerHost, folder: Path, port: int, state: Path) -> None:
    """The programs count in the first one."""
    generation = left_by_an_agent(host, folder, port, state)
    path = generation / "maps/findings"
    fd = bpf.pinned(path)
    definition = bpf.map_definition(fd, "findings")
    os.close(fd)
    put(definition, path)
    counts_and_says(host, folder, port, state, "is another one", "loaded anew", before=5)


@pytest.mark.parametrize(
    ("name", "type_", "attach"),
    [
        ("egress", ProgramType.SOCKET_FILTER, None),
        ("egress", ProgramType.CGROUP_SKB, AttachType.CGROUP_INET_EGRESS),
        ("count_waiting", ProgramType.CGROUP_SOCK, AttachType.CGROUP_INET4_POST_BIND),
    ],
)
def test_unrelated_program_in_place_of_ours(
    host: ContainerHost,
    folder: Path,
    port: int,
    state: Path,
    name: str,
    type_: ProgramType,
    attach: AttachType | None,
) -> None:
    generation = left_by_an_agent(host, folder, port, state)
    put_program(type_, attach, generation / "programs" / name, "unrelated")
    counts_and_says(host, folder, port, state, f"the program {name} is another one", "loaded anew", before=5)


def test_link_with_an_unrelated_program(host: ContainerHost, folder: Path, port: int, state: Path) -> None:
    generation = left_by_an_agent(host, folder, port, state)
    link = bpf.pinned(generation / "links/ingress")
    program = bpf.program_load(ProgramType.CGROUP_SKB, AttachType.CGROUP_INET_INGRESS, ACCEPT, "ingress")
    bpf.link_update(link, program)
    os.close(program)
    os.close(link)
    counts_and_says(host, folder, port, state, "the link ingress runs another program", "loaded anew", before=5)


@pytest.mark.parametrize("path", ["maps/findings", "programs/egress", "links/egress"])
def test_map_in_the_place_of_any_object(host: ContainerHost, folder: Path, port: int, state: Path, path: str) -> None:
    generation = left_by_an_agent(host, folder, port, state)
    put(array(8), generation / path)
    counts_and_says(host, folder, port, state, before=5)
    counts_and_says(host, folder, port, state, "goes on with the counts", before=10)


@pytest.mark.parametrize(
    "path", ["maps/findings", "programs/egress", "programs/egress_slow", "links/ingress", "links/egress", "manifest"]
)
def test_missing_object(host: ContainerHost, folder: Path, port: int, state: Path, path: str) -> None:
    generation = left_by_an_agent(host, folder, port, state)
    (generation / path).unlink()
    counts_and_says(host, folder, port, state, before=5)
    counts_and_says(host, folder, port, state, "goes on with the counts", before=10)


MANIFESTS = {
    "no JSON": b"{",
    "no object": b"[1]",
    "empty": b"{}",
    "types": b'{"names":7,"limits":[],"layout":"x","refused":3,"instructions":0,"learns_until":[],"compiler":1}',
    "names": b'{"names":[["map"],[1,2,3],["map","../../../elsewhere/unrelated"]],"refused":{},"instructions":{}}',
    "nothing named": b'{"names":[],"refused":{},"instructions":{},"compiler":"bcc"}',
    "nested": b"[" * 100_000,
    "infinite": b'{"names":[],"refused":{},"instructions":{"egress":Infinity},"learns_until":Infinity}',
    "huge": b'{"names":"' + b"x" * (8 << 20) + b'"}',
}


@pytest.mark.parametrize(
    ("version", "damage"), [*(("same", each) for each in MANIFESTS), ("other", "types"), ("other", "huge")]
)
def test_damaged_manifest(host: ContainerHost, folder: Path, port: int, state: Path, damage: str, version: str) -> None:
    """Of the generation that the agent would take over, and of one of another version that counts."""
    content = MANIFESTS[damage]
    unrelated = state.parent / "elsewhere/unrelated"
    unrelated.parent.mkdir()
    put(array(8), unrelated)
    generation = left_by_an_agent(host, folder, port, state)
    if version == "other":
        generation = generation.rename(generation.with_name("0" * 32))
    put(array(-(-len(content) // 8) * 8), generation / "manifest", content)
    counts_and_says(host, folder, port, state, before=5)
    assert unrelated.exists()
    assert len(list(state.glob("*/manifest"))) == 1
    counts_and_says(host, folder, port, state, "goes on with the counts", before=10)


def test_maps_of_another_version_with_other_sizes_than_it_described(
    host: ContainerHost, folder: Path, port: int, state: Path
) -> None:
    """The kernel would write behind the end of the buffer for an element."""
    generation = left_by_an_agent(host, folder, port, state)
    generation = generation.rename(generation.with_name("0" * 32))
    put(array(1 << 20), generation / "maps/counters")
    counts_and_says(host, folder, port, state, "cannot read what another version of udpwatch has counted", before=5)
    assert not generation.exists()


def test_symbolic_links_in_the_folder_are_not_followed(
    host: ContainerHost, folder: Path, port: int, state: Path
) -> None:
    unrelated = state.parent / "elsewhere"
    (unrelated / "maps").mkdir(parents=True)
    put(array(8), unrelated / "maps/unrelated")
    generation = left_by_an_agent(host, folder, port, state)
    (generation / "maps/findings").unlink()
    shutil.rmtree(generation / "links")
    (generation / "links").symlink_to(unrelated / "maps")
    (state / ("f" * 32)).symlink_to(unrelated)
    counts_and_says(host, folder, port, state, before=5)
    assert run_cli("detach", f"--state={state}").returncode == 0
    assert (unrelated / "maps/unrelated").exists()


def test_unrelated_objects_in_the_folder_stay(host: ContainerHost, folder: Path, port: int, state: Path) -> None:
    (state / "unrelated/maps").mkdir(parents=True, mode=0o700)
    state.chmod(0o700)
    put(array(8), state / "unrelated/maps/egress")
    put(array(8), state / "unrelated_map")
    for number in range(20):
        (state / f"{number:032x}" / "maps/deeper/still").mkdir(parents=True)
    counts_and_says(host, folder, port, state)
    assert len(list(state.glob("*/manifest"))) == 1
    assert not list(state.glob("*/maps/deeper"))
    done = run_cli("detach", f"--state={state}")
    assert done.returncode == 0 and "holds other objects" in done.stdout
    assert sorted(path.name for path in state.rglob("*")) == ["egress", "maps", "unrelated", "unrelated_map"]


@pytest.mark.parametrize("part", ["everything", "the number", "a record"])
def test_damaged_ledger(host: ContainerHost, folder: Path, port: int, state: Path, part: str) -> None:
    left_by_an_agent(host, folder, port, state)
    fd = bpf.pinned(state / "ledger")
    definition = bpf.map_definition(fd, "ledger")
    size = definition.value_bytes * definition.max_entries
    with mmap.mmap(fd, size) as memory:
        if part == "everything":
            memory[:] = os.urandom(size)
        elif part == "the number":
            memory[:8] = b"\xff" * 8
        else:
            memory[mmap.PAGESIZE :] = b"\xff" * (size - mmap.PAGESIZE)
    os.close(fd)
    # What the programs counted is still there: each of their findings is read from its beginning.
    # With another number, the record in the other half counts, which is the last one or the one before.
    says = () if part == "the number" else ("what it stored cannot be read",)
    counts_and_says(host, folder, port, state, *says, before=5)
    counts_and_says(host, folder, port, state, "goes on with the counts", before=10)


@pytest.mark.parametrize(("tries", "says"), [(4, "goes on with the counts"), (5, "5 agents ended with them")])
def test_ledger_with_which_agents_ended(
    host: ContainerHost, folder: Path, port: int, state: Path, tries: int, says: str
) -> None:
    """Nobody else writes to this word: an agent that ends before its first sample leaves it so."""
    left_by_an_agent(host, folder, port, state)
    fd = bpf.pinned(state / "ledger")
    definition = bpf.map_definition(fd, "ledger")
    with mmap.mmap(fd, definition.value_bytes * definition.max_entries) as memory:
        assert memory[8:16] == bytes(8), "the agent wrote since it started"
        memory[8:16] = tries.to_bytes(8, "little")
    os.close(fd)
    counts_and_says(host, folder, port, state, says, before=5)
    counts_and_says(host, folder, port, state, "goes on with the counts", before=10)


@pytest.mark.parametrize(
    "definition", [array(8), array(1 << 20), MapDefinition("ledger", 1, 4, 8, 1, 0)], ids=["small", "large", "hash"]
)
def test_unrelated_map_in_place_of_the_ledger(
    host: ContainerHost, folder: Path, port: int, state: Path, definition: MapDefinition
) -> None:
    left_by_an_agent(host, folder, port, state)
    put(definition, state / "ledger")
    counts_and_says(host, folder, port, state, before=5)
    counts_and_says(host, folder, port, state, "goes on with the counts", before=10)


def test_stop_removes_the_folder_and_a_crash_keeps_it(
    host: ContainerHost, folder: Path, port: int, state: Path
) -> None:
    """With --state-keep crash, as in the chart."""
    flags = (f"--state={state}", "--state-keep=crash")
    with Agent(folder, *flags) as agent:
        wrong_replies(host, port, 5)
        agent.counted(port, 5)
        agent.stop(signal.SIGKILL)
    wrong_replies(host, port, 5)
    with Agent(folder, *flags) as agent:
        assert agent.counted(port, 10) == 10
        assert agent.stop() == 0
        assert any("programs, maps and links were removed" in line for line in agent.log)
    # The folder itself is below another process's /proc/PID/fd, which the agent may no longer enter.
    assert not list(state.iterdir())


def pinned(state: Path) -> tuple[str, str, str] | None:
    """Return what doctor reports of the state folder: status, what it found, what to change."""
    report = json.loads(run_cli("doctor", "--json", f"--state={state}").stdout)
    rows = [check for check in report["checks"] if check["name"] == "pinned" and str(state) in check["found"]]
    return (rows[0]["status"], rows[0]["found"], rows[0]["change"]) if rows else None


def test_doctor_reports_programs_that_no_agent_uses(folder: Path, state: Path) -> None:
    assert pinned(state) is None
    with Agent(folder, f"--state={state}") as agent:
        status, found, _ = pinned(state) or ("", "", "")
        assert (status, found) == ("ok", f"an agent uses the programs in {state}")
        report = run_cli("doctor", "--agent", f"--connect={folder}/udpwatch.sock").stdout
        assert "the programs were loaded anew" in " ".join(report.split())
        assert agent.stop() == 0
    status, found, change = pinned(state) or ("", "", "")
    assert status == "warn" and "no agent uses them" in found and f"udpwatch detach --state {state}" in change
    with Agent(folder, f"--state={state}"):
        report = run_cli("doctor", "--agent", f"--connect={folder}/udpwatch.sock").stdout
        assert "the programs of the last agent were taken over" in " ".join(report.split())
