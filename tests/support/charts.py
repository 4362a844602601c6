"""The chart, rendered by the real helm, for its unit tests and for tests that run what it describes."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import yaml
from repository import ROOT

CHART = ROOT / "helm/udpwatch"
HELM = ROOT / "build/tools/helm"
NAMESPACE = "monitoring"
LONGEST_DEFAULT = 80  # shown in the chart's README

Manifest = dict[str, Any]
Values = Mapping[str, Any]

needs_helm = pytest.mark.skipif(
    not HELM.exists(), reason=f"needs helm at {HELM.relative_to(ROOT)}: `make build/tools/helm` fetches it (amd64)"
)


def helm(command: str, *arguments: str, values: Values | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``helm COMMAND ARGUMENTS`` with ``values`` over the chart's; the caller checks the exit status."""
    return subprocess.run(
        [HELM, command, *arguments, "--values", "-"],
        input=json.dumps(values or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@functools.cache
def _template(values: str, kube_version: str) -> str:
    arguments = ["udpwatch", str(CHART), "--namespace", NAMESPACE, "--kube-version", kube_version]
    done = helm("template", *arguments, values=json.loads(values))
    assert done.returncode == 0, done.stderr
    return done.stdout


def template(values: Values | None = None, kube_version: str = "1.37.0") -> str:
    """Return the output of `helm template`, which must succeed."""
    return _template(json.dumps(values or {}, sort_keys=True), kube_version)


def render(values: Values | None = None, kube_version: str = "1.37.0") -> list[Manifest]:
    """Return the chart's manifests with these values."""
    return [manifest for manifest in yaml.safe_load_all(template(values, kube_version)) if manifest]


def only(manifests: list[Manifest], kind: str) -> Manifest:
    """Return the one manifest of this kind."""
    (manifest,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return manifest


def values_list() -> str:
    """Return the list of values in the chart's README: each comment ``# --`` in values.yaml, with name and default."""
    text = (CHART / "values.yaml").read_text()
    defaults = yaml.safe_load(text)
    items, path, comment = "", [], ""
    for line in text.splitlines():
        key = re.match(r"( *)(\w+):", line)
        if found := re.match(r" *# -- (.*)", line):
            comment = found[1]
        elif comment and (more := re.match(r" *# (.*)", line)):
            comment += f" {more[1]}"
        elif key:
            path = [*path[: len(key[1]) // 2], key[2]]
            if comment:
                default = json.dumps(functools.reduce(lambda tree, name: tree[name], path, defaults))
                shown = f"`{default}`" if len(default) <= LONGEST_DEFAULT else "see values.yaml"
                items += _wrapped(f"- `{'.'.join(path)}` ({shown}): {comment}")
            comment = ""
    return items


def _wrapped(item: str) -> str:
    """Wrap a list item at spaces outside of code."""
    unbroken = re.sub(r"`[^`]{,90}`", lambda code: code[0].replace(" ", "\0"), item)
    lines = textwrap.wrap(unbroken, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ") + "\n"


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield path and value of each setting; an empty map counts as one setting."""
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from leaves(value, (*path, name))
    else:
        yield path, tree


def nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    """Return values with ``value`` at ``path``."""
    return functools.reduce(lambda inner, name: {name: inner}, reversed(path), value)
