"""`make release` run twice on one commit, without the image. Needs no root, but the network for pip's packages."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from charts import HELM, needs_helm
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from udpwatch.agent import __version__

ROOT = Path(__file__).resolve().parents[2]
DATE = "2026-01-02T03:04:05+00:00"
EPOCH = 1_767_323_045
NAMES = [
    "SHA256SUMS",
    f"udpwatch-{__version__}-py3-none-any.whl",
    f"udpwatch-{__version__}.cdx.json",
    f"udpwatch-{__version__}.tar.gz",
    f"udpwatch-chart-{__version__}.tgz",
]

pytestmark = [
    needs_helm,
    pytest.mark.skipif(not shutil.which("git"), reason="no git here: apt-get install git"),
]


def commit(folder: Path) -> None:
    """The work tree as it is, as a commit with the tag of its version."""
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", ".*_cache", ".hypothesis", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignored, symlinks=True)
    dates = {"GIT_AUTHOR_DATE": DATE, "GIT_COMMITTER_DATE": DATE}
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    for command in ("init --quiet", "add --all", "commit --quiet --no-gpg-sign --message=test", f"tag v{__version__}"):
        subprocess.run(["git", *identity, *command.split()], cwd=folder, env={**os.environ, **dates}, check=True)
    (folder / HELM.relative_to(ROOT)).parent.mkdir(parents=True)
    (folder / HELM.relative_to(ROOT)).symlink_to(HELM)


def release(clone: Path, umask: int, zone: str) -> Path:
    """Release with another umask, time zone and seed of hashes than others have; the folder with the files."""
    done = subprocess.run(
        [sys.executable, clone / "release/make.py", "--version", __version__, "--without-image"],
        env={**os.environ, "TZ": zone, "PYTHONHASHSEED": str(umask)},
        umask=umask,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The image was not built (IMAGE=off)" in done.stdout
    return clone / "build/release"


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two releases of one commit, in clones of different names and with files of different times."""
    folder = tmp_path_factory.mktemp("release")
    commit(folder / "first")
    first = release(folder / "first", 0o022, "UTC")
    subprocess.run(["git", "clone", "--quiet", folder / "first", folder / "the-second"], check=True)
    for path in (folder / "the-second").rglob("*"):
        if ".git" not in path.parts and path.is_file():
            os.utime(path, (time.time() - 86_400,) * 2)
    shutil.copytree(folder / "first/build/tools", folder / "the-second/build/tools", symlinks=True)
    return first, release(folder / "the-second", 0o077, "Asia/Tokyo")


@pytest.fixture(scope="module")
def files(releases: tuple[Path, Path]) -> Path:
    return releases[0]


def test_two_releases_are_the_same(releases: tuple[Path, Path]) -> None:
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in releases)
    assert sorted(first) == sorted(second) == NAMES
    assert [name for name in NAMES if first[name] != second[name]] == []


def test_checksums_are_those_of_the_files(files: Path) -> None:
    lines = (files / "SHA256SUMS").read_text().splitlines()
    expected = [f"{hashlib.sha256((files / name).read_bytes()).hexdigest()}  {name}" for name in NAMES[1:]]
    assert lines == expected


def test_archives_have_the_commits_time_and_no_owner(files: Path) -> None:
    for name in NAMES[3:]:
        with tarfile.open(files / name) as archive:
            members = archive.getmembers()
        assert [member.name for member in members] == sorted(member.name for member in members)
        assert {member.mtime for member in members} == {EPOCH}
        assert {(member.uid, member.gid, member.uname, member.gname) for member in members} == {(0, 0, "", "")}
    with zipfile.ZipFile(files / NAMES[1]) as wheel:
        assert {entry.date_time for entry in wheel.infolist()} == {(2026, 1, 2, 3, 4, 4)}  # zip counts in twos


def test_wheel_and_sdist_have_the_programs_and_type_markers(files: Path) -> None:
    wanted = {"agent/py.typed", "dns/py.typed", "bpf/LICENSE"}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "bpf").rglob("*.[ch]")}
    with tarfile.open(files / NAMES[3]) as sdist:
        assert {f"udpwatch-{__version__}/{name}" for name in wanted} <= set(sdist.getnames())
    with zipfile.ZipFile(files / NAMES[1]) as wheel:
        wanted.remove("bpf/LICENSE")  # it is with the metadata
        assert {f"udpwatch/{name}" for name in wanted} <= set(wheel.namelist())
        assert f"udpwatch-{__version__}.dist-info/licenses/bpf/LICENSE" in wheel.namelist()


def test_chart_renders_as_that_of_the_checkout(files: Path) -> None:
    def template(chart: Path) -> str:
        with_files = ("--set=prometheusRule.enabled=true,dashboards.enabled=true", "--kube-version=1.37.0")
        command = [HELM, "template", "udpwatch", chart, *with_files]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    rendered = template(files / NAMES[4])
    assert "UdpwatchAgentDown" in rendered and "udpwatch-fleet.json" in rendered
    assert rendered == template(ROOT / "helm/udpwatch")


def test_sbom_lists_every_package_of_the_constraints(files: Path) -> None:
    text = (files / NAMES[2]).read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bom = json.loads(text)
    assert (bom["metadata"]["component"]["name"], bom["metadata"]["component"]["version"]) == ("udpwatch", __version__)
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {line.lower().replace("_", "-").replace("==", "@") for line in lines}
    assert {part["purl"].removeprefix("pkg:pypi/") for part in bom["components"]} == pinned
    (needs,) = (each["dependsOn"] for each in bom["dependencies"] if each["ref"] == f"pkg:pypi/udpwatch@{__version__}")
    assert {re.sub("@.*", "", each) for each in needs} == {
        f"pkg:pypi/{name}" for name in ("dnslib", "idna", "inotify-simple", "prometheus-client", "pyroute2", "textual")
    }


def test_wheel_runs_in_a_new_environment(files: Path, tmp_path: Path) -> None:
    subprocess.run(["/usr/bin/python3", "-m", "venv", tmp_path / "venv"], check=True, capture_output=True)
    pip = [tmp_path / "venv/bin/pip", "install", "-q", "--disable-pip-version-check"]
    command = [*pip, f"--constraint={ROOT}/constraints.txt", files / NAMES[1]]
    subprocess.run(command, check=True, capture_output=True)
    program = [tmp_path / "venv/bin/udpwatch"]
    done = subprocess.run([*program, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: udpwatch")
    version = subprocess.run([*program, "--version"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert version.stdout.strip() == f"udpwatch {__version__}"
