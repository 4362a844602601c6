"""Write dashboards/grafana/*.json from the code beside it (`make dashboards`). A test fails if they are stale."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fleet
import health
import responder
import server
from grafana_foundation_sdk.cog.encoder import JSONEncoder

GRAFANA = Path(__file__).resolve().parent / "grafana"


def main() -> None:
    """Write to the given folder, by default to dashboards/grafana."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else GRAFANA
    for module in (fleet, server, responder, health):
        made = module.dashboard()
        text = json.dumps(made, cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / f"{made.uid}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
