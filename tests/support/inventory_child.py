"""List sockets as the agent does, in a process with few privileges: `inventory_child.py CACHE FIRST LAST`.

It prints a line when the programs are attached, waits for a line, and prints the ports from FIRST to LAST that it sees,
as JSON: port -> [PKTINFO, whether the process is known].
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

if __name__ == "__main__":
    os.environ["UDPWATCH_CACHE"] = sys.argv[1]

    from sensors import Watch

    from udpwatch.agent.kernel.loader import Limits

    ports = range(int(sys.argv[2]), int(sys.argv[3]))
    with contextlib.closing(Watch(Limits(max_peers=64))) as watch:
        print("ready", flush=True)
        sys.stdin.readline()
        assert watch.sensor._inventory
        sockets = [each for each in watch.sensor._inventory.read() if each.port in ports]
        print(json.dumps({each.port: [each.pktinfo, bool(each.pid)] for each in sockets}), flush=True)
