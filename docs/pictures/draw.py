"""Draws the pictures of the documentation anew: python docs/pictures/draw.py [NAME ...] [--out DIRECTORY]

A picture NAME is made by NAME.py beside this file, from the package's own objects, and says what they say.
tests/test_pictures.py draws them all and compares them with those that are stored here.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

HERE = Path(__file__).parent
NAMES = ("mla", "moe", "dualpipe", "planes", "walks", "quickstart")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of the documentation.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} [default: all]")
    parser.add_argument("--out", type=Path, default=HERE, help="directory [default: that of this file]")
    options = parser.parse_args()
    for name in options.names or NAMES:
        if name not in NAMES:
            parser.error(f"no picture {name!r}: there are {', '.join(NAMES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or NAMES:
        print(importlib.import_module(name).draw(options.out))


if __name__ == "__main__":
    main()
