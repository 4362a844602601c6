"""`udpwatch dns` with real clients, compared with dnsmasq, and as a process."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import dns.flags
import dns.message
import pytest
from agents import run_cli
from dns_server import Asked, FakeServer, Responder, ask, needs, rcode, right, texts, write
from stub_resolvers import LOOKUP, resolve
from waiting import wait_for

from udpwatch.agent.testing.lab import Lab, Namespace

NODE, NODE_6, CLIENT = "10.1.0.1", "fd01::1", "10.1.0.2"


def nothing_there(asked: Asked) -> bytes:
    """An upstream server that does not know the local names, like those on the Internet."""
    if "test" in asked.name:
        return asked.answer(rcode=3, authority=("300 SOA ns. admin. 1 2 3 4 300",))
    return right(asked)


@pytest.fixture(scope="module")
def lab() -> Iterator[tuple[Namespace, Namespace]]:
    with Lab() as built:
        yield built.pair("node", [NODE, NODE_6], "client", [CLIENT, "fd01::2"])


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)  # dnsmasq gives up root
        write(path / "hosts", "10.0.0.1 four.test four", "fd00::2 six.test", "10.0.0.3 both.test", "fd00::3 both.test")
        with (path / "hosts").open("a") as hosts:
            hosts.write("10.0.0.4 deep.above.test\n" + "".join(f"10.0.1.{each} many.test\n" for each in range(99)))
        (path / "nsswitch.conf").write_text("hosts: dns\n")
        for number, server in (("4", NODE), ("6", NODE_6)):
            (path / f"resolv{number}").write_text(f"nameserver {server}\noptions timeout:6 attempts:1\n")
        (path / "resolv-tcp").write_text(f"nameserver {NODE}\noptions use-vc\n")
        yield path


@pytest.fixture(scope="module")
def upstream(lab: tuple[Namespace, Namespace]) -> Iterator[FakeServer]:
    with FakeServer(lab[0], "127.0.0.99", nothing_there, port=5300) as server:
        yield server


OPTIONS = [
    *("--server=127.0.0.99#5300", "--local=/lan/", "--address=/wild.test/10.0.0.9", "--address=/no.test/"),
    *("--cname=alias.test,four.test", '--txt-record=text.test,two words,"quoted"', "--domain=test", "--expand-hosts"),
    *("--srv-host=_http._tcp.test,four.test,80,1,2", "--mx-host=mail.test,four.test,10", "--bogus-priv"),
    *("--ptr-record=9.9.9.10.in-addr.arpa,pointer.test", "--host-record=host.test,10.0.0.8,fd00::8"),
    *("--domain-needed", "--local-ttl=60", "--localmx", "--mx-target=target.test", "--mx-host=mail2.test"),
    *("--caa-record=caa.test,0,issue,ca.example", "--naptr-record=naptr.test,10,20,u,E2U+sip,!^.*$!sip:x@y!"),
    *("--naptr-record=naptr2.test,1,2,s,SIP+D2U,,_sip._udp.test", "--dns-rr=rr.test,65280,01:23:45"),
]


@pytest.fixture(scope="module")
def responder(lab: tuple[Namespace, Namespace], folder: Path, upstream: FakeServer) -> Iterator[Responder]:
    with Responder(lab[0], f"--addn-hosts={folder}/hosts", *OPTIONS) as running:
        yield running


# ---- clients ----


@pytest.mark.parametrize("server", [NODE, NODE_6])
@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
def test_dig(lab: tuple[Namespace, Namespace], responder: Responder, server: str, transport: str) -> None:
    needs("dig", "dnsutils")

    def dig(*words: str) -> list[str]:
        return lab[1].run(["dig", f"@{server}", transport, "+short", "+time=6", "+tries=1", *words]).splitlines()

    assert dig("four.test") == ["10.0.0.1"]
    assert dig("four.test", "AAAA") == []
    assert dig("six.test", "AAAA") == ["fd00::2"]
    assert dig("-x", "10.0.0.1") == ["four.test."]
    assert dig("-x", "fd00::2") == ["six.test."]
    assert dig("alias.test") == ["four.test.", "10.0.0.1"]
    assert dig("text.test", "TXT") == ['"two words" "\\"quoted\\""']
    assert dig("_http._tcp.test", "SRV") == ["1 2 80 four.test."]
    assert dig("www.example") == ["192.0.2.80"]
    assert dig("version.bind", "CH", "TXT")[0].startswith('"udpwatch-')
    for flags in ("+dnssec", "+cookie", "+nsid", "+subnet=192.0.2.0/24", "+noedns", "+bufsize=512", "+padding=64"):
        full = lab[1].run(["dig", f"@{server}", transport, "+time=6", "+tries=1", flags, "four.test"])
        assert "status: NOERROR" in full and "10.0.0.1" in full and "WARNING" not in full, full


@pytest.mark.parametrize("server", [NODE, NODE_6])
def test_nslookup(lab: tuple[Namespace, Namespace], responder: Responder, server: str) -> None:
    needs("nslookup", "dnsutils")
    assert "Address: 10.0.0.1" in lab[1].run(["nslookup", "four.test.", server])
    both = lab[1].run(["nslookup", "both.test.", server])
    assert "Address: 10.0.0.3" in both and "Address: fd00::3" in both
    assert "name = four.test." in lab[1].run(["nslookup", "10.0.0.1", server])


@pytest.mark.parametrize("server", [NODE, NODE_6])
def test_busybox(lab: tuple[Namespace, Namespace], responder: Responder, server: str) -> None:
    needs("busybox", "busybox-static")
    said = lab[1].run(["busybox", "nslookup", "four.test", server])
    assert "10.0.0.1" in said and "NXDOMAIN" not in said  # busybox asks for AAAA, too
    assert "fd00::3" in lab[1].run(["busybox", "nslookup", "both.test", server])


@pytest.mark.parametrize("resolv", ["resolv4", "resolv6", "resolv-tcp"])
def test_glibc(lab: tuple[Namespace, Namespace], responder: Responder, folder: Path, resolv: str) -> None:
    def getent(*words: str) -> list[str]:
        return resolve(lab[1], folder, resolv, "getent", *words)

    assert getent("ahostsv4", "four.test")[0] == "10.0.0.1"
    assert set(getent("ahosts", "four.test")) == {"10.0.0.1", "STREAM", "DGRAM", "RAW", "four.test"}
    assert getent("ahosts", "six.test")[0] == "fd00::2"
    assert {"10.0.0.3", "fd00::3"} <= set(getent("ahosts", "both.test"))
    assert getent("hosts", "10.0.0.1") == ["10.0.0.1", "four.test"]
    assert getent("ahostsv4", "alias.test")[0] == "10.0.0.1"
    assert getent("ahostsv4", "www.example")[0] == "192.0.2.80"


@pytest.mark.parametrize("resolv", ["resolv4", "resolv6"])
def test_musl(lab: tuple[Namespace, Namespace], responder: Responder, folder: Path, resolv: str) -> None:
    """A name with only A: musl gives up the name if AAAA gets an error."""
    needs("musl-gcc", "musl-tools")
    program = folder / "lookup"
    (folder / "lookup.c").write_text(LOOKUP)
    subprocess.run(["musl-gcc", "-static", "-o", program, folder / "lookup.c"], check=True)
    assert resolve(lab[1], folder, resolv, str(program), "four.test") == ["10.0.0.1"]
    assert resolve(lab[1], folder, resolv, str(program), "six.test") == ["fd00::2"]
    assert sorted(resolve(lab[1], folder, resolv, str(program), "both.test")) == ["10.0.0.3", "fd00::3"]
    assert resolve(lab[1], folder, resolv, str(program), "wild.test") == ["10.0.0.9"]
    assert resolve(lab[1], folder, resolv, str(program), "www.example") == ["192.0.2.80"]


# ---- agreement with dnsmasq ----

QUESTIONS = [
    *(("four.test", "A"), ("FOUR.test", "A"), ("four", "A"), ("six.test", "AAAA"), ("both.test", "A")),
    *(("both.test", "AAAA"), ("alias.test", "A"), ("alias.test", "CNAME"), ("text.test", "TXT")),
    *(("_http._tcp.test", "SRV"), ("mail.test", "MX"), ("wild.test", "A"), ("deep.below.wild.test", "A")),
    *(("no.test", "A"), ("below.no.test", "AAAA"), ("host.test", "A"), ("host.test", "AAAA"), ("x.lan", "A")),
    *(("x.lan", "TXT"), ("www.example", "A"), ("www.example", "AAAA"), ("gone.test", "A"), ("plain", "A")),
    *(("1.0.0.10.in-addr.arpa", "PTR"), ("9.9.9.10.in-addr.arpa", "PTR"), ("7.7.7.10.in-addr.arpa", "PTR")),
    *(("8.0.0.10.in-addr.arpa", "PTR"), ("four.test", "AAAA"), ("four.test", "HTTPS"), ("wild.test", "AAAA")),
    *(("text.test", "A"), ("alias.test", "AAAA"), ("mail.test", "A"), ("above.test", "A"), ("above.test", "TXT")),
    *(("test", "A"), ("x.above.test", "A"), ("caa.test", "CAA"), ("naptr.test", "NAPTR"), ("naptr2.test", "NAPTR")),
    *(("rr.test", "TYPE65280"), ("four.test", "MX"), ("six.test", "MX"), ("mail2.test", "MX"), ("alias.test", "MX")),
    ("host.test", "MX"),
    ("2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa", "PTR"),
]
#: udpwatch answers a name with an address for every type. dnsmasq queries upstream, and turns an NXDOMAIN for a
#: local name into NOERROR with that server's SOA; without an upstream server it responds with REFUSED.
NO_DATA = [("four.test", "AAAA"), ("four.test", "HTTPS"), ("wild.test", "AAAA"), ("alias.test", "AAAA")]
#: udpwatch never sets AA for upstream responses, nor for names that it only refuses to forward.
WITHOUT_AUTHORITY = {"no.test", "below.no.test", "x.lan", "plain", "7.7.7.10.in-addr.arpa", "above.test", "test"}
WITHOUT_AUTHORITY |= {("text.test", "A"), ("mail.test", "A")}


@pytest.fixture(scope="module")
def dnsmasq(folder: Path) -> Iterator[Namespace]:
    needs("dnsmasq", "dnsmasq-base")
    with Lab() as built:
        node = built.namespace("dnsmasq")
        with FakeServer(node, "127.0.0.99", nothing_there, port=5300):
            words = [f"--addn-hosts={folder}/hosts", "--no-hosts", "--no-resolv", "--conf-file=/dev/null", *OPTIONS]
            process = node.popen(["dnsmasq", "--keep-in-foreground", "--no-round-robin", "--pid-file", *words])
            try:
                wait_for(lambda: process.poll() is not None or _answers(node), "dnsmasq")
                assert process.poll() is None, process.communicate()
                yield node
            finally:
                process.kill()
                process.communicate()


def _answers(node: Namespace) -> bool:
    with contextlib.suppress(OSError):
        return bool(ask(node, "127.0.0.1", "four.test"))
    return False


@pytest.mark.parametrize(("name", "kind"), QUESTIONS)
def test_same_responses_as_dnsmasq(
    lab: tuple[Namespace, Namespace], responder: Responder, dnsmasq: Namespace, name: str, kind: str
) -> None:
    ours, theirs = ask(lab[1], NODE, name, kind), ask(dnsmasq, "127.0.0.1", name, kind)
    assert ours.flags & dns.flags.RA and theirs.flags & dns.flags.RA
    if (name, kind) in NO_DATA:
        assert rcode(ours) == "NOERROR" and ours.flags & dns.flags.AA
        assert rcode(theirs) == "NOERROR"
        return
    assert rcode(ours) == rcode(theirs)
    assert texts(ours) == texts(theirs)
    if name != "www.example":  # that one counts down
        assert [each.ttl for each in ours.answer] == [each.ttl for each in theirs.answer]
    if not {name, (name, kind)} & WITHOUT_AUTHORITY:
        assert ours.flags & dns.flags.AA == theirs.flags & dns.flags.AA


@pytest.mark.parametrize("tcp", [False, True])
def test_truncated_response_has_as_many_records_as_that_of_dnsmasq(
    lab: tuple[Namespace, Namespace], responder: Responder, dnsmasq: Namespace, tcp: bool
) -> None:
    ours, theirs = ask(lab[1], NODE, "many.test", tcp=tcp), ask(dnsmasq, "127.0.0.1", "many.test", tcp=tcp)
    assert ours.flags & dns.flags.TC == theirs.flags & dns.flags.TC == (0 if tcp else dns.flags.TC)
    assert len(texts(ours)) == len(texts(theirs)) == (99 if tcp else (512 - 12 - 15) // 16)


def test_without_upstream(folder: Path) -> None:
    """dnsmasq breaks musl's clients in this case."""
    needs("dnsmasq", "dnsmasq-base")
    options = ["--no-resolv", f"--addn-hosts={folder}/hosts"]
    with Lab() as built:
        node, other = built.namespace("node"), built.namespace("dnsmasq")
        process = other.popen(["dnsmasq", "-k", "--no-hosts", "--conf-file=/dev/null", "--pid-file", *options])
        try:
            wait_for(lambda: _answers(other), "dnsmasq")
            assert rcode(ask(other, "127.0.0.1", "four.test", "AAAA")) == "REFUSED"
        finally:
            process.kill()
            process.communicate()
        with Responder(node, *options):
            assert rcode(ask(node, "127.0.0.1", "four.test", "AAAA")) == "NOERROR"


# ---- the process ----


def test_ready_when_the_tables_are_loaded(lab: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    lines = [f"10.{each >> 16}.{each >> 8 & 255}.{each & 255} host{each}.test" for each in range(300_000)]
    hosts = write(tmp_path / "hosts", *lines)
    with Lab() as built:
        node = built.namespace("node")
        responder = Responder(node, f"--addn-hosts={hosts}", ready=False)
        seen: set[int] = set()

        def look() -> bool:
            with contextlib.suppress(OSError):
                seen.add(responder.get("/readyz")[0])
            return 200 in seen

        wait_for(look, "it to be ready")
        assert seen == {503, 200}
        assert texts(ask(node, "127.0.0.1", "host299999.test")) == ["10.4.147.223"]
        assert responder.stop() == 0, responder.log


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--no-such-option"], 1, "--no-such-option"),
        (["--dhcp-range=10.0.0.1,10.0.0.2"], 1, "run dnsmasq with --port=0 for DHCP"),
        (["--dnssec"], 1, "does not validate DNSSEC"),
        (["--port=99999"], 1, "port"),
        (["--conf-file=/nowhere/to/be/found"], 3, "/nowhere/to/be/found"),
        (["--conf-dir=/nowhere/to/be/found"], 3, "/nowhere/to/be/found"),
        (["--test"], 0, None),
        (["--version"], 0, None),
    ],
)
def test_exit_statuses(words: list[str], status: int, said: str | None) -> None:
    done = run_cli("dns", *words)
    assert done.returncode == status
    if said:
        assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_pid_file(lab: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    """An old file or symbolic link is replaced, not followed."""
    victim, file = write(tmp_path / "victim", "precious"), tmp_path / "dns.pid"
    file.symlink_to(victim)
    with Lab() as built:
        running = Responder(built.namespace("node"), f"--pid-file={file}", "--log-facility=-")
        assert int(file.read_text()) == running.process.pid
        assert not file.is_symlink() and victim.read_text() == "precious\n"
        assert running.stop() == 0, running.log
        assert not file.exists()


def test_missing_permission(lab: tuple[Namespace, Namespace]) -> None:
    wrapper = ("setpriv", "--bounding-set=-net_bind_service", "--inh-caps=-net_bind_service")
    with Lab() as built:
        responder = Responder(built.namespace("node"), ready=False, wrapper=wrapper)
        assert responder.process.wait(60) == 2
        responder.stop()
        assert "CAP_NET_BIND_SERVICE is missing" in responder.log[-1] and len(responder.log) == 1


def test_query_log(lab: tuple[Namespace, Namespace], folder: Path) -> None:
    with Lab() as built:
        node = built.namespace("node")
        with FakeServer(node, "127.0.0.99", port=5300):
            options = (f"--addn-hosts={folder}/hosts", "--log-queries", "--server=127.0.0.99#5300", "--local=/lan/")
            with Responder(node, *options) as responder:
                for name, kind in [("four.test", "A"), ("www.example", "A"), ("www.example", "A"), ("x.lan", "A")]:
                    ask(node, "127.0.0.1", name, kind)
                ask(node, "127.0.0.1", "four.test", "AAAA", tcp=True)
                wait_for(lambda: responder.has_logged("NODATA-IPv6"), "the last line")
                said = [line.removeprefix("udpwatch: ") for line in responder.log]
                first = said.index("query[A] four.test from 127.0.0.1")
                assert said[first:] == [
                    "query[A] four.test from 127.0.0.1",
                    f"{folder}/hosts four.test is 10.0.0.1",
                    "query[A] www.example from 127.0.0.1",
                    "forwarded www.example to 127.0.0.99#5300",  # with the port unless it is 53, as dnsmasq
                    "reply www.example is 192.0.2.80",
                    "query[A] www.example from 127.0.0.1",
                    "cached www.example is 192.0.2.80",
                    "query[A] x.lan from 127.0.0.1",
                    "config x.lan is NXDOMAIN",
                    "query[AAAA] four.test from 127.0.0.1",
                    "config four.test is NODATA-IPv6",
                ]


def test_metrics(lab: tuple[Namespace, Namespace], responder: Responder) -> None:
    before = responder.metric("responses_total", source="hosts")
    ask(lab[1], NODE, "four.test")
    ask(lab[1], NODE, "four.test", tcp=True)
    ask(lab[1], NODE_6, "four.test")
    assert responder.metric("responses_total", source="hosts") == before + 3
    assert responder.get("/healthz")[0] == 200


def test_statistics_on_request(lab: tuple[Namespace, Namespace], responder: Responder) -> None:
    ask(lab[1], NODE, "www.example")
    responder.process.send_signal(signal.SIGUSR1)
    wait_for(lambda: responder.has_logged("server 127.0.0.99#5300: queries sent"), "the statistics")
    assert responder.has_logged("cache size 10000, 0/")


def test_interrupt_at_any_time(lab: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    """SIGTERM while the table is being read."""
    lines = [f"10.{each >> 16}.{each >> 8 & 255}.{each & 255} host{each}.test" for each in range(300_000)]
    hosts = write(tmp_path / "hosts", *lines)
    with Lab() as built:
        responder = Responder(built.namespace("node"), f"--addn-hosts={hosts}", ready=False)
        wait_for(lambda: responder.has_logged("metrics on"), "it to read")
        assert responder.stop() == 0
        assert not any("Traceback" in line for line in responder.log), responder.log
