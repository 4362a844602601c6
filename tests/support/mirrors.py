"""Debian's packages as this machine's apt gets them: from the same mirrors, by the same proxies."""

from __future__ import annotations

import platform
import re
import subprocess

#: what decides how apt fetches, among all that `apt-config dump` prints
_FETCHING = re.compile(r"Acquire::(https?::|Check-|Retries|ForceIP)")


def sources(release: str) -> list[str]:
    """Return lines of sources.list that name a release ("trixie") on the mirrors this machine has its own release from.

    Empty where apt knows no Debian mirror: before the first `apt-get update`, or on another distribution.
    """
    own = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    form = "$(ORIGIN)\t$(REPO_URI) $(RELEASE) $(COMPONENT)"
    found = set()
    for line in _output("apt-get", "indextargets", "--format", form, "Created-By: Packages").splitlines():
        origin, _, words = line.partition("\t")
        uri, suite, component = words.split()
        if origin == "Debian" and suite.partition("-")[0] == own:
            found.add(f"deb {uri} {suite.replace(own, release, 1)} {component}")
    return sorted(found)


def apt_options() -> list[str]:
    """Return this machine's settings of how apt fetches (proxies, dates, retries), as lines of apt.conf."""
    return [line for line in _output("apt-config", "dump").splitlines() if _FETCHING.match(line)]


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
