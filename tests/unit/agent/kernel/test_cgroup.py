"""Mounts of cgroup v2, from a list of mounts that the test writes."""

from __future__ import annotations

import os
from pathlib import Path

from udpwatch.agent.kernel import cgroup

ROOT = "24 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
FUSE = "90 24 0:50 / /home/u/a\r\x0b\x85 rw - fuse.sshfs u@h:/ rw\n"


def test_mount_point_is_found(tmp_path: Path) -> None:
    """Names in the list are kept as they are; other users may choose some of them."""
    names = {r"/sys/fs/cgroup": "/sys/fs/cgroup", r"/a\040b\134c": r"/a b\c", "/\x85é\r\udcff": "/\x85é\r\udcff"}
    lines = [f"35 24 0:30 / {name} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n" for name in names]
    (tmp_path / "mountinfo").write_bytes(os.fsencode(ROOT + FUSE + "".join(lines)))
    assert list(cgroup._mounted(tmp_path / "mountinfo")) == list(names.values())
