"""`make census`: run real servers of Debian on a host with several addresses, and write the table of docs/census.md."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from census import Census, Setup, setups
from census_table import Result, key_of, read, result_of, table, write, write_page
from debian_trees import PLACE, NotAvailable, remove, tree

RESULTS = PLACE / "results.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make census")
    parser.add_argument("--names", default="", help="only set-ups with one of these in their name")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="only set-ups that have not passed, or have changed; docs/census.md stays as it is",
    )
    parser.add_argument("--keep", action="store_true", help="keep the files of the packages")
    arguments = parser.parse_args()
    PLACE.mkdir(parents=True, exist_ok=True)
    wanted = setups()
    parts = [part.strip().lower() for part in arguments.names.split(",") if part.strip()]
    known = read(RESULTS) if parts or arguments.resume else {}  # the table of a whole run holds nothing older
    todo = [each for each in wanted if not parts or any(part in each.name.lower() for part in parts)]
    if arguments.resume:
        todo = [each for each in todo if not _passed(each, known.get(each.name))]
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="udpwatch-test-") as cache, Census(Path(cache)) as census:
        for setup in todo:
            try:
                known[setup.name] = _run(census, setup)
            except NotAvailable as error:
                missing[setup.name] = str(error)
                print(f"{setup.name}: {error}", flush=True)
                continue
            finally:
                if not arguments.keep:
                    remove(setup.packages)
            _say(known[setup.name])
            write(RESULTS, known.values())
    results = [known[each.name] for each in wanted if each.name in known]
    text = table(results, missing)
    print(f"\n{text}")
    if not parts and not arguments.resume:  # the page shows one run
        write_page(text)
    failed = [each for each in results if each.failures]
    print("\n".join(f"not as expected: {each.name}: {'; '.join(each.failures)}" for each in failed))
    return 1 if failed or missing else 0


def _run(census: Census, setup: Setup) -> Result:
    version = tree(setup.packages).version
    first = census.run(setup)
    fixed = census.run(setup, remedied=True) if setup.remedy else None
    return result_of(setup, version, first, fixed, census.run_healed(setup))


def _passed(setup: Setup, result: Result | None) -> bool:
    return result is not None and result.key == key_of(setup) and not result.failures


def _say(result: Result) -> None:
    print(f"{result.name} ({result.version}): {'; '.join(result.failures) or 'as expected'}", flush=True)
    if result.log:
        print("".join(f"    {line}\n" for line in result.log.splitlines()), end="", flush=True)


if __name__ == "__main__":
    if os.geteuid():
        sys.exit("udpwatch: cannot run the census: not root; run `sudo make census`")
    sys.exit(main())
