"""What must hold before anything is built: a clean work tree, the tag at HEAD, one version everywhere."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from errors import ReleaseError

#: Where the version stands. pyproject.toml takes it from agent/__init__.py; the chart must repeat it, since Helm
#: installs it straight from a checkout as well.
PLACES = (
    ("agent/__init__.py", "__version__", r'^__version__ = "(.*)"$'),
    ("helm/udpwatch/Chart.yaml", "version", r"^version: (\S+)$"),
    ("helm/udpwatch/Chart.yaml", "appVersion", r"^appVersion: (\S+)$"),
)
_VERSION = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?")


@dataclass(frozen=True)
class Commit:
    """The commit that is released. ``time`` is its committer date, in seconds since 1970."""

    sha: str
    time: int


def check(root: Path, version: str) -> Commit:
    """Return the commit to release as ``version``, or raise ReleaseError with the first reason not to."""
    if not version:
        raise ReleaseError("cannot make a release: VERSION is not set; run `make release VERSION=0.1.0`")
    if not _VERSION.fullmatch(version):
        raise ReleaseError(f'invalid value "{version}" for VERSION: expected a version such as 0.1.0 or 0.2.0rc1')
    for reason in (_changes(root), _tag(root, version), _versions(root, version), _changelog(root, version)):
        if reason:
            raise ReleaseError(f"cannot release {version}: {reason}")
    sha, time = _git(root, "log", "-1", "--format=%H %ct").split()
    return Commit(sha, int(time))


def _changes(root: Path) -> str:
    changed = _git(root, "status", "--porcelain").splitlines()
    if not changed:
        return ""
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return f"the work tree has changes ({changed[0][3:]}{more}); commit or stash them"


def _tag(root: Path, version: str) -> str:
    tag, head = f"v{version}", _git(root, "rev-parse", "HEAD")
    tagged = _git(root, "for-each-ref", "--format=%(*objectname)%(objectname)", f"refs/tags/{tag}")[:40]
    if not tagged:
        return f"there is no tag {tag}; create it: git tag --annotate {tag} --message 'udpwatch {version}'"
    if tagged != head:
        return f"tag {tag} is at {tagged[:12]}, HEAD is at {head[:12]}; run `git checkout {tag}`"
    return ""


def _versions(root: Path, version: str) -> str:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    found = [("pyproject.toml", "version", project["version"])] if "version" in project else []
    for name, key, pattern in PLACES:
        match = re.search(pattern, (root / name).read_text(), re.MULTILINE)
        found.append((name, key, match[1].strip("\"'") if match else "nothing"))
    wrong = [f"{key} in {name} is {value}" for name, key, value in found if value != version]
    return f"{', '.join(wrong)}; change it, commit, and move the tag" if wrong else ""


def _changelog(root: Path, version: str) -> str:
    heading = rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$"
    if re.search(heading, (root / "CHANGELOG.md").read_text(), re.MULTILINE):
        return ""
    return f'CHANGELOG.md has no section "## {version} - YYYY-MM-DD"; add it, commit, and move the tag'


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"cannot run git {arguments[0]}: {done.stderr.strip()}; run this in a git clone")
    return done.stdout.rstrip("\n")


if __name__ == "__main__":
    try:
        check(Path(__file__).resolve().parents[1], sys.argv[1])
    except ReleaseError as error:
        sys.exit(f"udpwatch: {error}")
