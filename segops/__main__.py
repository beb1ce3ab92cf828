"""``python -m segops info``."""

from __future__ import annotations

import argparse

from ._info import info


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m segops", description="Facts about this installation of segops.")
    parser.add_argument("command", choices=["info"], help="info: versions, backends, and reasons")
    parser.parse_args()
    print(info())


if __name__ == "__main__":
    main()
