"""The table of methods, generated from the hooks.

python -m distill.objectives            # print it
python -m distill.objectives --table    # write it into docs/method.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distill.objectives.methods import table

DOCUMENT = Path(__file__).parents[2] / "docs" / "method.md"
BEGIN, END = "<!-- methods: python -m distill.objectives --table -->", "<!-- /methods -->"


def inserted(document: str) -> str:
    """The document with the present table between its marks. Raises ValueError if it has none."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no place for the table; put {BEGIN} and {END} around it")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m distill.objectives", description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help=f"write it into {DOCUMENT.name}")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="another document with the marks")
    options = parser.parse_args(arguments)
    if not options.table:
        print(table())
        return 0
    try:
        text = inserted(options.document.read_text())
    except (OSError, ValueError) as error:
        print(f"{options.document}: {error}", file=sys.stderr)
        return 2
    options.document.write_text(text)
    print(f"wrote the table of methods into {options.document}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
