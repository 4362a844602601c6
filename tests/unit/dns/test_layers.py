"""Which module of dns/ may import which. The table is the design; `docs/architecture.md` draws it."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

DNS = Path(__file__).resolve().parents[3] / "dns"
#: module -> modules of dns/ that it may import
ALLOWED: dict[str, set[str]] = {
    # bytes and values
    "errors": set(),
    "host_port": set(),
    "names": set(),
    "netlink": set(),
    "idn": set(),
    "shares": set(),
    "budget": set(),
    "settings": {"names"},
    "records": set(),
    "message": {"names", "records"},
    "cname": {"message", "records"},
    "cache_entry": {"cname", "message", "names", "records"},
    "cache": {"cache_entry", "message"},
    "alias": {"message", "records", "settings"},
    "networks": {"names"},
    "policy": {"alias", "message", "names", "networks", "settings"},
    "routes": {"names", "settings"},
    "edns": {"settings"},
    "limited_log": set(),
    "metrics": {"cache", "message"},
    # files
    "hosts_file": {"idn", "names", "settings"},
    "resolvconf": {"settings"},
    "watch": set(),
    "interfaces": {"addresses", "names", "settings"},
    "synth": {"names", "settings"},
    "zone": {"errors", "hosts_file", "interfaces", "message", "names", "settings", "synth"},
    # from a query to a response
    "direct": {"cache_entry", "message", "names"},
    "responder": {
        "direct",
        "names",
        "alias",
        "cache",
        "cache_entry",
        "message",
        "policy",
        "routes",
        "settings",
        "zone",
    },
    "querylog": {"message", "metrics", "names", "records", "responder"},
    "statistics": {"cache", "metrics"},
    # threads and system calls
    "libc": set(),
    "timers": set(),
    "packet_loop": {"limited_log", "timers"},
    # upstream servers
    "transport": {"libc", "packet_loop", "settings"},
    "resolution": {"cache_entry", "metrics", "settings", "shares", "transport"},
    "upstream_socket": {"limited_log", "resolution", "settings", "transport"},
    "tcp_connection": {"message", "settings", "shares"},
    "upstream_tcp": {"budget", "message", "settings", "shares", "tcp_connection", "timers", "transport"},
    "upstream": {
        *("cname", "message", "metrics", "names", "packet_loop", "policy", "resolution", "settings", "transport"),
        *("cache_entry", "edns", "limited_log", "tcp_connection", "upstream_socket", "upstream_tcp"),
    },
    "failover": {
        "upstream_socket",
        *("cache_entry", "message", "metrics", "packet_loop", "resolution", "settings", "tcp_connection", "upstream"),
    },
    "forwarder": {
        *("cache", "cache_entry", "edns", "failover", "limited_log", "message", "metrics", "names", "packet_loop"),
        *("policy", "querylog", "resolution", "responder", "settings", "shares"),
    },
    # clients
    "addresses": {"names", "netlink"},
    "address_monitor": {"addresses", "limited_log"},
    "neighbours": {"limited_log", "netlink"},
    "admission": {"addresses", "limited_log", "names", "policy", "settings"},
    "udp_socket": {"libc"},
    "udp": {"admission", "limited_log", "metrics", "packet_loop", "responder", "udp_socket"},
    "pacing": {"budget", "metrics", "packet_loop", "shares", "udp"},
    "tcp": {"admission", "budget", "forwarder", "limited_log", "metrics", "names", "responder", "udp_socket"},
    "listen": {"addresses", "admission", "errors", "names", "settings", "tcp", "udp", "udp_socket"},
    # configuration
    "conffile": {"errors"},
    "values": {"conffile", "host_port", "idn", "names", "settings"},
    "option_readers": {"conffile", "message", "names", "settings", "values"},
    "option": {"option_readers"},
    "other_options": {"option", "option_readers"},
    "option_table": {"option", "option_readers", "other_options", "values"},
    "options": {
        *("conffile", "errors", "message", "names", "option", "option_readers", "option_table", "other_options"),
        *("settings", "values"),
    },
    "servers_file": {"conffile", "errors", "hosts_file", "option_readers", "settings", "values"},
    # the whole
    "loop_detection": {"message", "packet_loop", "settings", "timers", "transport"},
    "reload": {
        "loop_detection",
        *("errors", "interfaces", "metrics", "resolvconf", "responder", "routes", "servers_file", "settings", "zone"),
    },
    "service": {
        "loop_detection",
        *("address_monitor", "addresses", "admission", "budget", "cache", "edns", "failover", "forwarder"),
        *(
            "interfaces",
            "limited_log",
            "listen",
            "metrics",
            "pacing",
            "packet_loop",
            "querylog",
            "reload",
            "responder",
            "settings",
        ),
        *(
            "neighbours",
            "statistics",
            "tcp",
            "transport",
            "udp",
            "upstream",
            "upstream_socket",
            "upstream_tcp",
            "watch",
            "zone",
        ),
    },
    "__init__": set(),
}
#: Modules that decide: no sockets, no files, no clock of their own.
WITHOUT_IO = {
    "host_port",
    "idn",
    "names",
    "records",
    "message",
    "cname",
    "cache_entry",
    "cache",
    "alias",
    "networks",
    "policy",
    "routes",
    "edns",
    "shares",
    "synth",
    "responder",
    "settings",
    "timers",
    "resolution",
}
IO_CALLS = {"open", "socket.socket", "time.time", "time.monotonic", "asyncio.get_running_loop", "os.open"}


def imports_of(path: Path) -> set[str]:
    """Modules of this project that a module imports, without `udpwatch.dns.`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "udpwatch.dns":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("udpwatch"):
            found.add(node.module.removeprefix("udpwatch.dns."))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("udpwatch")}
    return found


@pytest.mark.parametrize("path", sorted(DNS.glob("*.py")), ids=lambda path: path.stem)
def test_module_imports_only_what_the_table_allows(path: Path) -> None:
    assert imports_of(path) <= ALLOWED[path.stem]


def test_table_has_no_unused_permission() -> None:
    unused = {name: ALLOWED[name] - imports_of(DNS / f"{name}.py") for name in ALLOWED}
    assert not {name: modules for name, modules in unused.items() if modules}


def test_import_graph_has_no_cycle() -> None:
    TopologicalSorter({path.stem: imports_of(path) for path in DNS.glob("*.py")}).prepare()


@pytest.mark.parametrize("name", sorted(WITHOUT_IO))
def test_deciding_module_does_no_io(name: str) -> None:
    tree = ast.parse((DNS / f"{name}.py").read_text())
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & IO_CALLS
