"""The import layers: kernel -> sources -> daemon -> client -> commands (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from repository import AGENT, DNS

#: stage -> what it may import of ours
ALLOWED = {
    "model": set(),
    "errors": set(),
    "config": {"model", "errors"},
    "kernel": {"model", "errors"},
    "sources": {"model", "errors", "kernel", "servers"},
    "attribution": {"model", "errors", "kernel"},
    "servers": {"model", "errors", "kernel", "attribution"},
    "heal": {"model", "errors", "kernel"},
    # udpwatch: of dns/
    "daemon": {"model", "errors", "config", "kernel", "sources", "attribution", "servers", "heal", "udpwatch"},
    "client": {"model", "errors", "daemon", "servers", "testing"},
    "testing": {"errors", "kernel"},
    "commands": {
        *("model", "errors", "config", "kernel", "sources", "servers", "daemon", "client", "testing", "udpwatch"),
    },
}
WIRING = {"cli", "__init__"}
#: What the agent uses of the responder beside starting it. None of these modules knows of DNS.
OF_DNS = {"udpwatch.dns.host_port", "udpwatch.dns.netlink", "udpwatch.dns.shares"}


def stage_of(module: str) -> str:
    return module.removeprefix("udpwatch.agent").removeprefix(".").split(".")[0]


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in OF_DNS:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("udpwatch"):
            names = [alias.name for alias in node.names] if node.module == "udpwatch.agent" else [""]
            found |= {stage_of(f"{node.module}.{name}") for name in names}
        elif isinstance(node, ast.Import):
            found |= {stage_of(alias.name) for alias in node.names if alias.name.startswith("udpwatch")}
    return found - {"__version__", "__init__"}


@pytest.mark.parametrize("path", sorted(AGENT.rglob("*.py")), ids=lambda path: str(path.relative_to(AGENT)))
def test_imports_point_backwards(path: Path) -> None:
    stage = path.relative_to(AGENT).parts[0].removesuffix(".py")
    if stage in WIRING:
        return
    assert imports_of(path) <= ALLOWED[stage] | {stage}


def test_only_the_loading_child_imports_bcc() -> None:
    users = [path.name for path in AGENT.rglob("*.py") if "import bcc" in path.read_text().replace("cannot import", "")]
    assert users == ["loader_child.py"]


def test_only_commands_print_or_exit() -> None:
    for path in {*AGENT.rglob("*.py"), *DNS.rglob("*.py")} - {AGENT / "cli.py", *(AGENT / "commands").glob("*.py")}:
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        assert not calls & {"print", "sys.exit", "exit"}, path
