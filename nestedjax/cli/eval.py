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

PIECE = 512  # tokens fed at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument(
        "--data", metavar="FILE", nargs="+", help="text files or folders; default: held-out parts"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Evaluate; returns the exit code."""
    import jax
    import numpy as np

    from nestedjax import models, runs
    from nestedjax.data import DataError
    from nestedjax.evaluation import Losses, Totals, stream_losses

    config = runs.require_config(args.run)
    texts = _texts(config, args.data)
    loaded = runs.load(args.run)
    definition, params = models.split(loaded.model)

    @jax.jit
    def score(params, tokens, targets, state):
        logits, state = models.merge(definition, params)(tokens, state)
        return runs.token_losses(logits, targets), state

    start = jax.jit(lambda params: models.merge(definition, params).init_state(1))(params)
    files: dict[str, Losses] = {}
    for name, documents in texts:
        found = Losses(Totals(), {})
        for text in documents:
            tokens = np.asarray(loaded.vocabulary.encode(text))
            if tokens.size >= 2:
                found = found.plus(
                    stream_losses(
                        lambda x, y, state: score(params, x, y, state),
                        start,
                        tokens,
                        size_bytes=len(text),
                        piece=PIECE,
                    )
                )
        if not found.total.tokens:
            raise DataError(f"{name} has a single token, which predicts nothing; give more text")
        files[name] = found
    everything = Losses(Totals(), {})
    for losses in files.values():
        everything = everything.plus(losses)
    if args.json:
        print(json.dumps(_as_json(loaded.step, files, everything), indent=2))
    else:
        print(f"{args.run}: {config.preset} at step {loaded.step}")
        print(_table(files, everything))
    return 0


def _texts(config, files) -> list[tuple[str, list[bytes]]]:
    """What to evaluate: name -> documents."""
    from nestedjax.data import bundled, expand, read_documents, take_split

    if files:
        return [(str(path), read_documents(path)) for path in expand(files)]
    own = read_documents(config.data.files or bundled())
    return [(f"{split} split", take_split(own, split)) for split in ("valid", "test")]


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
