"""The wheel works without a checkout: it has the programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from repository import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: setuptools leaves its build folder beside what it builds
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", ".*_cache"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "-w", folder, source], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_wheel_has_every_source(site: Path) -> None:
    for source in (
        *(ROOT / "bpf").rglob("*.[ch]"),
        *(ROOT / "agent").rglob("*.py"),
        ROOT / "agent/udpwatch.service",
        ROOT / "agent/py.typed",
        ROOT / "dns/py.typed",
    ):
        assert (site / "udpwatch" / source.relative_to(ROOT)).read_bytes() == source.read_bytes()


def test_wheel_works_without_the_checkout(site: Path, tmp_path: Path) -> None:
    code = "import udpwatch.agent.cli as cli, sys; print(cli.__file__); sys.exit(cli.main(['doctor']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0].startswith(str(site))
    assert "udpwatch works here" in done.stdout
