"""Archives whose bytes depend on their contents alone."""

from __future__ import annotations

import gzip
import shutil
import tarfile
from pathlib import Path


def rewrite_tar_gz(source: Path, target: Path, time: int) -> None:
    """Write the members of a tar.gz again: sorted, owned by root, of mode 755 or 644, changed at ``time``."""
    with (
        tarfile.open(source) as old,
        target.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=time) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            plain = tarfile.TarInfo(member.name)
            plain.type, plain.linkname, plain.size, plain.mtime = member.type, member.linkname, member.size, time
            plain.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            new.addfile(plain, old.extractfile(member) if member.isreg() else None)


def compress(source: Path, target: Path, time: int) -> None:
    """Compress one file with gzip; the header has neither its name nor the present time."""
    with (
        source.open("rb") as plain,
        target.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=time) as compressed,
    ):
        shutil.copyfileobj(plain, compressed, 1 << 20)
