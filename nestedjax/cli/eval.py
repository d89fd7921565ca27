"""Loss, perplexity and bits per byte of a trained run, by file and by position in context.

Each document is one context from its first token to its last, however long: texts far longer than
the training length stream through a state of constant size."""

import argparse
import json

EXAMPLE = """example:
  nestedjax eval runs/first
  nestedjax eval runs/first --data chapter1.txt chapter2.txt --json

Without --data the held-out parts of the run's own text are evaluated: its validation split (5%)
and its test split (5%)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument(
        "--data", metavar="FILE", nargs="+", help="text files or folders; default: held-out parts"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Evaluate; returns the exit code."""
    from nestedjax import run

    trained = run.load(args.run)
    found = run.evaluate(trained, args.data)
    if args.json:
        print(json.dumps(_as_json(trained.step, found.files, found.all), indent=2))
    else:
        print(f"{args.run}: {trained.run.preset} at step {trained.step}")
        print(_table(found.files, found.all))
    return 0


def _as_json(step, files, everything) -> dict:
    return {
        "step": step,
        "files": [{"file": name, **losses.total.row()} for name, losses in files.items()],
        "positions": [
            {"first": low, "stop": high, **totals.row()}
            for (low, high), totals in everything.by_position.items()
        ],
        "all": everything.total.row(),
    }


def _table(files, everything) -> str:
    rows = [(name, losses.total) for name, losses in files.items()]
    if len(rows) > 1:
        rows.append(("all", everything.total))
    blocks = [("file", rows)]
    places = [(f"{low:,}-{high - 1:,}", t) for (low, high), t in everything.by_position.items()]
    blocks.append(("position in context", places))
    width = max(len(name) for head, rows in blocks for name in (head, *(r[0] for r in rows)))
    lines = []
    for head, rows in blocks:
        lines += ["", f"{head:{width}}  {'tokens':>12}  {'loss':>8}  {'perplexity':>10}  bits/byte"]
        for name, total in rows:
            lines.append(
                f"{name:{width}}  {total.tokens:>12,}  {total.loss:>8.4f}"
                f"  {total.perplexity:>10.3f}  {total.bits_per_byte:>9.4f}"
            )
    return "\n".join(lines)
