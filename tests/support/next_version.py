"""Another version of udpwatch: records that its programs and its agent share have other layouts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from repository import AGENT, BPF, DNS

#: struct of records.h -> its class in records.py
_RECORDS = {
    "finding": "FindingValue",
    "finding_key": "FindingKey",
    "event": "EventRecord",
    "server_counts": "ServerCounts",
    "server_key": "ServerKey",
    "conversation": "ConversationRecord",
}
#: The first members of this one are read by their position.
_NOT_FIRST = {"server_counts": (r".*?further;\n", r'.*?\("further", c_uint64\),')}


def make_next_version(tree: Path) -> Path:
    """Copy udpwatch into a new folder and change the copy; return the folder, for PYTHONPATH."""
    for source, name in ((AGENT, "agent"), (BPF, "bpf"), (DNS, "dns")):
        shutil.copytree(source, tree / "udpwatch" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for struct, record in _RECORDS.items():
        in_c, in_python = _NOT_FIRST.get(struct, ("", ""))
        _insert(tree / "udpwatch/bpf/records.h", rf"struct {struct} {{\n{in_c}", "    __u64 novelty;\n")
        fields = rf"class {record}\(.*?_fields_ = \[{in_python}"
        _insert(tree / "udpwatch/agent/kernel/records.py", fields, '("novelty", c_uint64),')
    return tree


def _insert(path: Path, after: str, text: str) -> None:
    changed, times = re.subn(after, lambda found: found[0] + text, path.read_text(), flags=re.DOTALL)
    assert times == 1, after
    path.write_text(changed)
