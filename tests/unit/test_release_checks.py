"""`make release` refuses a wrong commit with one line that says why. Real git, in a repository made here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

FILES = ("pyproject.toml", "agent/__init__.py", "helm/udpwatch/Chart.yaml", "CHANGELOG.md", "release")


class Repository:
    """The files that are checked, committed as version 9.8.7 and tagged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in FILES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, folder / name)
        self.change("agent/__init__.py", r'(__version__ = ").*"', r'\g<1>9.8.7"')
        self.change("helm/udpwatch/Chart.yaml", r"((?:v|appV)ersion: ).*", r"\g<1>9.8.7")
        self.change("CHANGELOG.md", r"## Unreleased\n", "## Unreleased\n\n## 9.8.7 - 2031-02-03\n")
        (folder / ".gitignore").write_text("__pycache__/\n")
        self.git("init", "--quiet")
        self.commit()
        self.git("tag", "v9.8.7")

    def git(self, *arguments: str) -> str:
        identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
        command = ["git", *identity, "-c", "tag.gpgsign=false", *arguments]
        return subprocess.run(command, cwd=self.folder, check=True, capture_output=True, text=True).stdout

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message=test: commit")

    def change(self, name: str, pattern: str, text: str) -> None:
        """Replace each match in a file; there must be one."""
        changed, number = re.subn(pattern, text, (self.folder / name).read_text())
        assert number, (name, pattern)
        (self.folder / name).write_text(changed)

    def refusal(self, version: str = "9.8.7") -> str:
        """Return the output of the check, "" when it passes."""
        command = [sys.executable, self.folder / "release/checks.py", version]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == (1 if done.stderr else 0)
        assert done.stderr.count("\n") <= 1, done.stderr
        return done.stderr.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    if not shutil.which("git"):
        pytest.skip("no git here: apt-get install git")
    return Repository(tmp_path)


def test_tagged_commit_is_accepted(repository: Repository) -> None:
    assert repository.refusal() == ""


def test_annotated_tag_is_accepted(repository: Repository) -> None:
    repository.git("tag", "--force", "--annotate", "--message=udpwatch 9.8.7", "v9.8.7")
    assert repository.refusal() == ""


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("", "udpwatch: cannot make a release: VERSION is not set; run `make release VERSION=0.1.0`"),
        ("v9.8.7", 'udpwatch: invalid value "v9.8.7" for VERSION: expected a version such as 0.1.0 or 0.2.0rc1'),
    ],
)
def test_invalid_version_is_refused(repository: Repository, version: str, expected: str) -> None:
    assert repository.refusal(version) == expected


@pytest.mark.parametrize("name", ["CHANGELOG.md", "new-file"])
def test_dirty_tree_is_refused(repository: Repository, name: str) -> None:
    with (repository.folder / name).open("a") as file:
        file.write("changed\n")
    assert repository.refusal() == (
        f"udpwatch: cannot release 9.8.7: the work tree has changes ({name}); commit or stash them"
    )


def test_missing_tag_is_refused(repository: Repository) -> None:
    repository.git("tag", "--delete", "v9.8.7")
    assert repository.refusal() == (
        "udpwatch: cannot release 9.8.7: there is no tag v9.8.7; create it: "
        "git tag --annotate v9.8.7 --message 'udpwatch 9.8.7'"
    )


def test_tag_of_another_commit_is_refused(repository: Repository) -> None:
    tagged = repository.git("rev-parse", "HEAD")[:12]
    repository.commit()
    head = repository.git("rev-parse", "HEAD")[:12]
    assert repository.refusal() == (
        f"udpwatch: cannot release 9.8.7: tag v9.8.7 is at {tagged}, HEAD is at {head}; run `git checkout v9.8.7`"
    )


@pytest.mark.parametrize(
    ("name", "pattern", "text", "expected"),
    [
        ("agent/__init__.py", '"9.8.7"', '"9.8.6"', "__version__ in agent/__init__.py is 9.8.6"),
        (
            "helm/udpwatch/Chart.yaml",
            r"\nversion: .*",
            "\nversion: 1.0.0",
            "version in helm/udpwatch/Chart.yaml is 1.0.0",
        ),
        (
            "helm/udpwatch/Chart.yaml",
            "appVersion: .*",
            "appVersion: '1'",
            "appVersion in helm/udpwatch/Chart.yaml is 1",
        ),
        ("pyproject.toml", r'dynamic = \["version"\]', 'version = "2.0.0"', "version in pyproject.toml is 2.0.0"),
    ],
)
def test_version_that_differs_is_refused(
    repository: Repository, name: str, pattern: str, text: str, expected: str
) -> None:
    repository.change(name, pattern, text)
    repository.commit()
    repository.git("tag", "--force", "v9.8.7")
    assert repository.refusal() == f"udpwatch: cannot release 9.8.7: {expected}; change it, commit, and move the tag"


def test_changelog_without_the_version_is_refused(repository: Repository) -> None:
    repository.change("CHANGELOG.md", "## 9.8.7 - 2031-02-03", "## 9.8.7")
    repository.commit()
    repository.git("tag", "--force", "v9.8.7")
    assert repository.refusal() == (
        'udpwatch: cannot release 9.8.7: CHANGELOG.md has no section "## 9.8.7 - YYYY-MM-DD"; '
        "add it, commit, and move the tag"
    )


def test_folder_without_git_is_refused(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(repository.folder / ".git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(repository.folder.parent))
    assert repository.refusal().startswith("udpwatch: cannot run git status: ")
