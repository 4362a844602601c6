"""Folders of this repository."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AGENT, BPF, DNS, DOCS = ROOT / "agent", ROOT / "bpf", ROOT / "dns", ROOT / "docs"
GOLDEN = ROOT / "tests/golden"
