"""Loss, perplexity and bits per byte of a trained run, by file and by position in context.

Each document is one context from its first token to its last, however long: texts far longer than
the training length stream through a state of constant size.

With --use also what the model relies on: the loss of the same texts with each memory not written,
frozen at its start or reset at every chunk, and with each layer of memories, continuum block and
convolution skipped; how far the gates of the memories went; and how far training moved what they
begin from. These are read in rows of the run's length, each a fresh context, as validation reads
them; +- is the standard error over rows. Every switch reads the texts once more. The picture is
RUN/use.png.

With --json: loss is in nats per token and perplexity is exp(loss). What no number can hold is null:
a perplexity above e^700, and all figures of a loss that is not a number."""

import json as json_format
import math
import os
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter

from nestedjax.cli.command import parse
from nestedjax.cli.errors import guarded

EXAMPLE = """  nestedjax eval runs/first
  nestedjax eval runs/first --data chapter1.txt chapter2.txt --json
  nestedjax eval runs/first --use
"""


def evaluate(
    run: str,
    /,
    *,
    data: tuple[str, ...] = (),
    json: bool = False,
    use: bool = False,
    modules: Annotated[tuple[str, ...], Parameter("--import")] = (),
) -> int:
    """Evaluate a run.

    Args:
      run: the run folder.
      data: text files or folders; none for the held-out parts of the run's own text: its
        validation split (5%) and its test split (5%).
      json: print one JSON object.
      use: also measure what each part of the model is worth to it.
      modules: modules to import, in which models of your own are.
    """
    from nestedjax import run as runs
    from nestedjax.cli import flags
    from nestedjax.cli.printing import printable

    flags.import_modules(modules)
    trained = runs.load(run)
    found = runs.evaluate(trained, data or None, use=use)
    note = None if data else _note(trained.run.data)
    if json:
        values = _as_json(trained.step, found.files, found.all)
        if use:
            values |= _use_as_json(found)
        values |= {} if note is None else {"note": note}
        print(json_format.dumps(values, indent=2, allow_nan=False))
    else:
        print(f"{run}: {trained.run.preset} at step {trained.step}")
        print(printable(_table(found.files, found.all)))
        if use:
            print(printable(_use_table(found)))
            if found.use and (picture := _plot(found.use, run, trained.run.preset)) is not None:
                print(f"\npicture: {picture}")
        if note is not None:
            print(f"\n{note}")
    return 0


def _use_as_json(found: Any) -> dict[str, Any]:
    """What the model relies on."""
    plain = found.unswitched
    return {
        "unswitched": plain if math.isfinite(plain) else None,
        "use": [row.row() for row in found.use],
        "gates": [row.row() for row in found.gates],
        "starts": [row.row() for row in found.starts],
    }


def _use_table(found: Any) -> str:
    """What the model relies on, in 80 columns."""
    if not found.use:
        return "\nuse: nothing to switch: no memory, continuum block or convolution in this model"
    width = max(len(row.name) for row in (*found.use, *found.gates, *found.starts))
    width = min(max(width, 8), 26)
    lines = ["", f"{'use':{width}}  {'switch':<12}  {'loss':>8}  {'delta':>10}  {'+-':>8}"]
    lines.append(f"{'model':{width}}  {'as it is':<12}  {found.unswitched:>8.4f}")
    for row in found.use:
        lines.append(
            f"{row.name[:width]:{width}}  {row.switch:<12}  {row.loss:>8.4f}  {row.delta:>+10.5f}"
            f"  {row.standard_error:>8.5f}"
        )
    if found.gates:
        head = ("least", "mean", "most")
        lines += ["", f"{'gate':{width}}  {'':<24}" + "".join(f"  {name:>8}" for name in head)]
        for row in found.gates:
            figures = (row.least, row.mean, row.most)
            lines.append(
                f"{row.name[:width]:{width}}  {row.gate[:24]:<24}"
                + "".join(f"  {value:>8.4f}" for value in figures)
            )
    if found.starts:
        lines += ["", f"{'start':{width}}  movement in training, of its norm"]
        lines += [f"{row.name[:width]:{width}}  {row.movement:>8.3f}" for row in found.starts]
    return "\n".join(lines)


def _plot(rows: Any, folder: str, title: str) -> str | None:
    """Draw what each switch costs; a picture that cannot be written costs a warning."""
    from nestedjax.errors import RunWarning
    from nestedjax.run.plots import plot_use

    picture = os.path.join(folder, "use.png")
    try:
        plot_use(rows, picture, title=title)
    except OSError as error:
        why = error.strerror or error
        warnings.warn(f"no picture in {picture} ({why})", RunWarning, stacklevel=2)
        return None
    return picture


def main(argv: Sequence[str]) -> int:
    """`nestedjax eval`; returns the exit code."""
    call = parse("nestedjax eval RUN", evaluate, argv, about=__doc__ or "", example=EXAMPLE)
    return 0 if call is None else guarded("eval", call)


def _note(data: Any) -> str:
    """Why the loss of the validation split is not the one that training printed."""
    count = data.validation_batches
    which = "all batches" if count is None else f"the first {count} batches"
    return (
        f"val_loss in training is another number: {which} of the valid split, {data.batch} rows of"
        f" {data.length} tokens each, every row a fresh context. Here each document is one context"
        " from its first token to its last, and all of the split is read."
    )


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
