"""``python -m tests.golden [PATTERN …] [--write]``: run the golden runs whose names match, and say what differs."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported


def main() -> int:
    """Returns 1 where something differs from the file, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="names with * and ?; by default all")
    parser.add_argument("--write", action="store_true", help="renew the digests of these runs")
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    options = parser.parse_args()

    from tests.golden import digest
    from tests.golden.configurations import CONFIGURATIONS
    from tests.golden.runs import run
    from tests.support.choosing import choose_names

    names = choose_names(parser, CONFIGURATIONS, options.patterns, "golden run")
    if options.list:
        print("\n".join(names))
        return 0
    kept = digest.read_digests()
    elsewhere = digest.environment_differences(kept["environment"]) if kept["runs"] else []
    if elsewhere and not options.write:
        print(f"digests were written elsewhere ({'; '.join(elsewhere)}): bits are compared of portable runs alone")
    if elsewhere and options.write and len(names) < len(CONFIGURATIONS) and kept["runs"]:
        parser.error(f"the environment has changed ({'; '.join(elsewhere)}): renew all of them at once")
    renewed = {name: entry for name, entry in kept["runs"].items() if name in CONFIGURATIONS}
    began, differing = time.monotonic(), 0
    for name in names:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = run(CONFIGURATIONS[name].run, Path(folder)).digests()
        exact = not elsewhere or CONFIGURATIONS[name].portable
        differences = digest.compare(kept["runs"].get(name), found, exact, CONFIGURATIONS[name].loose)
        differing += bool(differences)
        renewed[name] = found
        told = f"DIFFERS: {', '.join(differences)}" if differences else "same"
        print(f"{time.monotonic() - start:6.1f} s  {name}: {told}", flush=True)
    if options.write:
        digest.write_digests(renewed)
    renewal = ", renewed" if options.write and differing else ""
    print(f"{len(names)} runs in {time.monotonic() - began:.0f} s, {differing} differ{renewal}")
    return 0 if options.write or not differing else 1


if __name__ == "__main__":
    sys.exit(main())
