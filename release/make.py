"""Build a release: wheel, sdist, chart and image, with SBOMs and SHA256SUMS. CONTRIBUTING.md explains its use.

Rule 1: the tagged commit is built, never the work tree.
Rule 2: the same commit gives the same bytes: every time is the commit's, every archive is sorted.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import image
import sbom
from archives import compress, rewrite_tar_gz
from checks import Commit, check
from errors import ReleaseError
from programs import run

ROOT = Path(__file__).resolve().parents[1]
HELM = ROOT / "build/tools/helm"
OUTPUT = ROOT / "build/release"
_NETWORK = "check the network and pip's configuration"


def main() -> int:
    """Build what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(prog="release")
    parser.add_argument(
        "--version", required=True, metavar="VERSION", help="the version to release; HEAD is tagged vVERSION"
    )
    parser.add_argument("--base", default="", metavar="IMAGE", help="the image's base [the Dockerfile's]")
    parser.add_argument("--without-image", action="store_true", help="build neither the image nor its SBOM")
    parsed = parser.parse_args()
    try:
        commit = check(ROOT, parsed.version)
        os.umask(0o022)
        with tempfile.TemporaryDirectory(prefix="udpwatch-release-") as name:
            Release(parsed.version, commit, Path(name)).build(parsed.base, not parsed.without_image)
    except ReleaseError as error:
        print(f"udpwatch: {error}", file=sys.stderr)
        return 1
    return 0


class Release:
    """One release of ``commit``, whose files replace those of OUTPUT."""

    def __init__(self, version: str, commit: Commit, scratch: Path) -> None:
        self._version, self._commit, self._scratch = version, commit, scratch
        self._source = scratch / "source"
        self._environment = {**os.environ, "SOURCE_DATE_EPOCH": str(commit.time), "LC_ALL": "C.UTF-8", "TZ": "UTC"}

    def build(self, base: str, with_image: bool) -> None:
        """Build all files and print their checksums."""
        shutil.rmtree(OUTPUT, ignore_errors=True)
        OUTPUT.mkdir(parents=True)
        self._export()
        wheel = self._python()
        self._chart()
        self._write_sbom(wheel.name, f"udpwatch-{self._version}", sbom.Contents(self._installed(wheel)))
        if with_image:
            self._image(base)
        self._sums()
        print(f"{OUTPUT.relative_to(ROOT)}:\n{(OUTPUT / 'SHA256SUMS').read_text()}", end="")
        if with_image:
            print(
                "Two runs give the same files, the image only with the same base and the same Debian packages: it\n"
                "takes the newest ones from Debian's mirror. Its SBOM lists their versions."
            )
        else:
            print("Two runs give the same files. The image was not built (IMAGE=off).")

    def _export(self) -> None:
        """Write the commit's files to a folder: with its time, and with modes that no umask changed."""
        command = ["git", "-C", str(ROOT), "-c", "tar.umask=0022", "archive", "--format=tar", self._commit.sha]
        archive = subprocess.run(command, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(self._source)  # noqa: S202 - our own commit

    def _python(self) -> Path:
        """Build the sdist, and the wheel from the sdist, so that the sdist is known to have all of it."""
        built = self._scratch / "python"
        command = [sys.executable, "-m", "build", f"--outdir={built}", str(self._source)]
        run(command, "build wheel and sdist", _NETWORK, self._environment)
        sdist, wheel = f"udpwatch-{self._version}.tar.gz", f"udpwatch-{self._version}-py3-none-any.whl"
        rewrite_tar_gz(built / sdist, OUTPUT / sdist, self._commit.time)
        return Path(shutil.copyfile(built / wheel, OUTPUT / wheel))

    def _installed(self, wheel: Path) -> list[str]:
        """Install the wheel with the versions of constraints.txt; return each package's METADATA."""
        site = self._scratch / "site"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        command += [f"--target={site}", f"--constraint={self._source / 'constraints.txt'}", str(wheel)]
        run(command, "install the wheel", _NETWORK, self._environment)
        return [path.read_text() for path in sorted(site.glob("*.dist-info/METADATA"))]

    def _chart(self) -> None:
        helm = str(HELM) if HELM.exists() else shutil.which("helm")
        if not helm:
            raise ReleaseError("cannot package the chart: helm is not installed; put it on the PATH")
        packed, name = self._scratch / "chart", f"udpwatch-chart-{self._version}.tgz"
        run([helm, "package", str(self._source / "helm/udpwatch"), f"--destination={packed}"], "package the chart")
        rewrite_tar_gz(packed / f"udpwatch-{self._version}.tgz", OUTPUT / name, self._commit.time)

    def _image(self, base: str) -> None:
        stem, archive = f"udpwatch-{self._version}-image-{image.architecture()}", self._scratch / "image.tar"
        image.build(self._source, self._version, self._commit, base, archive)
        self._write_sbom(f"{stem}.tar.gz", stem, image.contents(archive))
        compress(archive, OUTPUT / f"{stem}.tar.gz", self._commit.time)

    def _write_sbom(self, file: str, stem: str, contents: sbom.Contents) -> None:
        text = sbom.write(contents, file, self._version, self._commit)
        (OUTPUT / f"{stem}.cdx.json").write_text(text)

    def _sums(self) -> None:
        files = sorted(OUTPUT.iterdir())
        lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
        (OUTPUT / "SHA256SUMS").write_text("".join(lines))


if __name__ == "__main__":
    sys.exit(main())
