"""The loss by position of a trained run over a text far longer than its training rows.

Claim:     the loss of a text of 65,536 bytes is flat or falls with the position (issue 2, line d)
Command:   python -m experiments.long_text runs/hope_nano
Data:      the last 65,536 bytes of the text that ships with the package, turned eight times by an
           eighth: from position 8,192 on every row of the table is of the same text
Hardware:  2 CPU cores, 2 minutes
Expected:  `make train`, seed 0: 1.72 below 256, 1.71 in every row from 4,096 to 65,536
Before:    rows of 256 bytes with a fresh memory each: 1.75 below 256, 1.755, 1.768, 1.773 beyond
"""

import argparse
import json
import tempfile
from pathlib import Path

import nestedjax as nj
from nestedjax import data

LENGTH, TURNS = 65_536, 8


def turned(text: str) -> list[str]:
    """The text from TURNS places on, each to its end and on from its beginning."""
    starts = range(0, len(text), len(text) // TURNS)
    return [text[start:] + text[:start] for start in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder of a byte model")
    given = parser.parse_args()
    text = data.bundled().read_bytes().decode()[-LENGTH:]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "turned.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in turned(text)))
        found = nj.evaluate(nj.load(given.run), path)
    for (first, stop), totals in found.all.by_position.items():
        place = f"{first:,}-{stop - 1:,}"
        print(f"{place:16} {totals.tokens:>9,} bytes  {totals.loss:.4f} nats a byte")


if __name__ == "__main__":
    main()
