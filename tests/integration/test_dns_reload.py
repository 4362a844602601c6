"""Tables change under load: no query is lost, and no client sees a partial table."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import dns.message
import pytest
from dns_server import (
    Asked,
    FakeServer,
    Load,
    Responder,
    ask,
    bare_query,
    connected,
    rcode,
    receive_message,
    right,
    send_message,
    texts,
    write,
)
from waiting import wait_for

from udpwatch.agent.testing.lab import Lab, Namespace

NODE = "127.0.0.1"
BIG = 300_000


@pytest.fixture(scope="module")
def node() -> Iterator[Namespace]:
    with Lab() as built:
        yield built.namespace("node")


def is_at(node: Namespace, address: str, name: str = "a.test") -> bool:
    return texts(ask(node, NODE, name)) == [address]


def generation(path: Path, number: int) -> None:
    """Names with the same address, with many others in between, so that reading the file takes a while."""
    address = f"10.{number >> 8}.{number & 255}.1"
    between = [f"192.0.2.{each % 250} filler{each}.test" for each in range(200)]
    write(path, f"{address} first.test", *between, f"{address} last.test")


def the_same(answers: dict[str, dns.message.Message]) -> str:
    """Of two queries in a row, the second may see a later generation, never an earlier one."""
    got = [texts(answers[name]) for name in ("first.test", "last.test") if name in answers]
    if any(len(each) != 1 for each in got):
        return f"a table without a name: {got}"
    one, other = (tuple(map(int, each[0].split("."))) for each in got)
    return f"back in time: {got}" if other < one else ""


def test_hundred_reloads_under_load(node: Namespace, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    generation(hosts, 0)
    with Responder(node, f"--addn-hosts={hosts}") as responder:
        load = Load(node, NODE, "first.test", "last.test")
        load.check = the_same
        for number in range(1, 101):
            generation(hosts, number)
            if number % 5 == 0:
                before = responder.metric("hosts_reloads_total")
                responder.process.send_signal(signal.SIGHUP)
                wait_for(lambda before=before: responder.metric("hosts_reloads_total") > before, "it to read them")
            load.has_asked(10)
        wait_for(lambda: is_at(node, "10.0.100.1", "last.test"), "the last generation")
        load.stop()
        assert responder.metric("hosts_reload_errors_total") == 0


def test_written_in_place(node: Namespace, tmp_path: Path) -> None:
    hosts = write(tmp_path / "hosts", "10.0.0.1 a.test")
    with Responder(node, f"--addn-hosts={hosts}"):
        hosts.write_text("10.0.0.2 a.test\n")
        wait_for(lambda: is_at(node, "10.0.0.2"), "the new table", seconds=4)
        with hosts.open("a") as file:  # what is there is taken, the rest when it comes
            file.write("10.0.0.3 b.test\n")
            file.flush()
            file.write("10.0.0.4 c.test\n")
        wait_for(lambda: is_at(node, "10.0.0.4", "c.test"), "the rest", seconds=4)
        assert is_at(node, "10.0.0.3", "b.test")


def test_hangup_under_load(node: Namespace, tmp_path: Path) -> None:
    """Local, cached and forwarded names."""
    hosts = write(tmp_path / "hosts", "10.0.0.1 a.test")
    with FakeServer(node, "127.0.0.99", port=5300):
        with Responder(node, f"--addn-hosts={hosts}", "--server=127.0.0.99#5300") as responder:
            loads = [Load(node, NODE, "a.test", "cached.example") for _ in range(3)]
            for _ in range(100):
                responder.process.send_signal(signal.SIGHUP)
                loads[0].has_asked(4)
            for load in loads:
                load.stop()
            assert responder.process.poll() is None


def test_big_table_loads_under_load(node: Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hosts = write(tmp_path / "hosts", "10.0.0.1 a.test")
    with Responder(node, f"--addn-hosts={hosts}") as responder:
        load = Load(node, NODE, "a.test")
        lines = (f"10.{each >> 16}.{each >> 8 & 255}.{each & 255} host{each}.big.test" for each in range(BIG))
        write(hosts, "10.0.0.2 a.test", *lines)
        before = load.answered
        wait_for(lambda: responder.metric("hosts_entries") > BIG, "the table")
        during = load.answered - before
        assert is_at(node, "10.0.0.2")
        assert is_at(node, "10.4.147.223", f"host{BIG - 1}.big.test")
        load.stop()
        with capsys.disabled():
            print(f" [{BIG} names: {during} answers meanwhile, {responder.resident_kib() >> 10} MB]", end="")
        assert during > 0


def test_config_map(node: Namespace, tmp_path: Path) -> None:
    """Kubernetes replaces a link: files -> ..data/file -> ..2024_01/file."""

    def publish(number: int) -> None:
        folder = tmp_path / f"..{number}"
        folder.mkdir()
        (folder / "hosts").write_text(f"10.0.0.{number} a.test\n")
        (tmp_path / "..new").symlink_to(folder.name)
        (tmp_path / "..new").rename(tmp_path / "..data")

    publish(1)
    (tmp_path / "hosts").symlink_to("..data/hosts")
    for named in (tmp_path / "hosts", tmp_path, tmp_path / "..data" / "hosts", tmp_path / "..data"):
        with Responder(node, f"--addn-hosts={named}"):
            first = int(texts(ask(node, NODE, "a.test"))[0].rpartition(".")[2])
            publish(first + 1)
            wait_for(
                lambda first=first: is_at(node, f"10.0.0.{first + 1}"), "the new one", seconds=4
            )  # LOOK_SECONDS: 5


def test_folder(node: Namespace, tmp_path: Path) -> None:
    write(tmp_path / "one", "10.0.0.1 a.test")
    with Responder(node, f"--addn-hosts={tmp_path}"):
        write(tmp_path / "two", "10.0.0.2 b.test")
        wait_for(lambda: is_at(node, "10.0.0.2", "b.test"), "a new file")
        (tmp_path / "one").unlink()
        wait_for(lambda: rcode(ask(node, NODE, "a.test")) == "REFUSED", "the file to be gone")


def test_file_that_appears_later(node: Namespace, tmp_path: Path) -> None:
    hosts = tmp_path / "later" / "hosts"
    with Responder(node, f"--addn-hosts={hosts}") as responder:
        assert responder.has_logged(f"cannot read {hosts}: No such file or directory")
        assert responder.metric("hosts_unreadable") == 1
        hosts.parent.mkdir()
        write(hosts, "10.0.0.1 a.test")
        wait_for(lambda: rcode(ask(node, NODE, "a.test")) == "NOERROR", "the file to be noticed")
        assert responder.metric("hosts_unreadable") == 0


def test_unreadable_file(node: Namespace, tmp_path: Path) -> None:
    """The previous table stays in use, and the file is read once it is readable. Root can read everything; a folder is
    nothing that can be read as a file, nor is a FIFO."""
    hosts = write(tmp_path / "hosts", "10.0.0.1 a.test")
    with Responder(node, f"--addn-hosts={hosts}") as responder:
        hosts.unlink()
        os.mkfifo(hosts)
        wait_for(lambda: responder.metric("hosts_reload_errors_total") == 1, "the error")
        assert responder.has_logged("the previous local names stay in use")
        assert is_at(node, "10.0.0.1")
        assert responder.metric("hosts_unreadable") == 1
        responder.reload()
        assert responder.metric("hosts_reload_errors_total") == 2
        assert responder.metric("hosts_unreadable") == 1, "as long as it cannot be read"
        assert is_at(node, "10.0.0.1")
        write(hosts, "10.0.0.2 a.test", "nonsense b.test", "10.0.0.3 b.test")
        wait_for(lambda: is_at(node, "10.0.0.2"), "the new table")
        assert responder.has_logged(f"bad address at {hosts} line 2")
        assert is_at(node, "10.0.0.3", "b.test")
        assert responder.metric("hosts_unreadable") == 0


def test_unreadable_files_are_counted(node: Namespace, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        write(tmp_path / name, f"10.0.0.1 {name}.test")
    with Responder(node, f"--addn-hosts={tmp_path}") as responder:
        for name in ("one", "two"):
            os.mkfifo(tmp_path / "new")
            (tmp_path / "new").rename(tmp_path / name)
        said = f"cannot read {tmp_path}/one: not a regular file, and 1 more"
        wait_for(lambda: responder.has_logged(said), "both to be missed")
        assert responder.metric("hosts_unreadable") == 2
        (tmp_path / "one").unlink()
        wait_for(lambda: responder.metric("hosts_unreadable") == 1, "one of them to be gone")
        write(tmp_path / "two", "10.0.0.2 two.test")
        wait_for(lambda: responder.metric("hosts_unreadable") == 0, "all to be read")


def test_unreadable_by_permission(node: Namespace, tmp_path: Path) -> None:
    """Without CAP_DAC_OVERRIDE, as in the agent: chmod is a change."""
    hosts = write(tmp_path / "hosts", "10.0.0.1 a.test")
    tmp_path.chmod(0o755)
    drop = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search")
    with Responder(node, f"--addn-hosts={hosts}", wrapper=drop) as responder:
        hosts.chmod(0o000)
        write(tmp_path / "other", "10.0.0.2 a.test").chmod(0o000)
        (tmp_path / "other").rename(hosts)
        wait_for(lambda: responder.metric("hosts_reload_errors_total") >= 1, "the error")
        assert is_at(node, "10.0.0.1")
        hosts.chmod(0o644)
        wait_for(lambda: is_at(node, "10.0.0.2"), "the file to be read", seconds=4)


def test_hangup_clears_the_cache(node: Namespace) -> None:
    with FakeServer(node, "127.0.0.99", port=5300) as server:
        with Responder(node, "--server=127.0.0.99#5300") as responder:
            for _ in range(3):
                ask(node, NODE, "www.example")
            assert len(server.asked) == 1
            responder.reload()
            ask(node, NODE, "www.example")
            assert len(server.asked) == 2


def test_terminated_under_load(node: Namespace, tmp_path: Path) -> None:
    """Queries in progress are answered before the end."""
    arrived, go = threading.Event(), threading.Event()

    def script(asked: Asked) -> bytes:
        arrived.set()
        go.wait(4)
        return right(asked)

    with FakeServer(node, "127.0.0.99", script, port=5300):
        responder = Responder(node, "--server=127.0.0.99#5300")
        with connected(node, NODE) as client, connected(node, NODE, socket.SOCK_STREAM) as link:
            for number in range(20):
                client.send(bare_query("drain.example", number))
            for number in range(10):
                send_message(link, bare_query("drain.example", number))
            assert arrived.wait(10)
            wait_for(lambda: responder.metric("coalesced_total") == 29, "all of them to wait")
            responder.process.send_signal(signal.SIGTERM)
            wait_for(lambda: responder.get("/readyz")[0] == 503, "it to be stopping")
            go.set()
            answers = [dns.message.from_wire(client.recv(1000)) for _ in range(20)]
            answers += [dns.message.from_wire(receive_message(link)) for _ in range(10)]
        assert {tuple(texts(answer)) for answer in answers} == {("192.0.2.80",)}
        assert responder.process.wait(30) == 0
        responder.stop()
        assert "Traceback" not in "\n".join(responder.log)
