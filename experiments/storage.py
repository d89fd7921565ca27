"""Storage: does a memory keep what is written into it, with nothing trained?

Claim under test: with the write of the `hope_nano` preset an untrained memory answers the keys that
were written into it nearly as well as the delta rule does; with the published write it does not.
Every choice of the menu of writes (`RuleConfig`), and of the memory that is written, is changed
alone, from the published write without its clip (`hope_nano_literal`) and from `hope_nano`'s.

Command:   python -m experiments.storage [--draws 200] [--chunk 1] [--seed 0] [--out runs/storage]
Data:      random unit vectors of 16 numbers, the same ones for every memory
Protocol:  into one memory as it is initialised, four pairs (key, target) token by token, then eight
           more at a tenth of the rate; then each of the four first keys is asked for. The write is
           the library's: `mlp_memory` of given keys, values and rates, or `delta_rule`. A memory
           that generates its targets is given values, and the target of a pair is what the memory
           made of the value when it was written, M(v); with values="shared" it is the value.
           right   of the 12 targets the own one has the largest cosine with M(k) or, where a memory
                   starts near the identity, with M(k) - k: two answers, chance is about 1/6
           top 2   the own target is one of the two nearest to M(k): chance is 1/6
           cosine  of M(k) with the own target. What is not finite counts as wrong, cosine 0
           Nothing decays, but where a row says so. With --chunk 1 a token is written at weights
           that hold all tokens before it: there objective "l2" without DGD is the same as "delta"
Earlier:   a study with scripts of its own (0.1 was 1/9 there), in the last section of the table
Hardware:  1 CPU core, two minutes at most, nearly all of it to compile
Output:    a table, `storage.json` and `storage.png` in --out; what was found is in LOG.md
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments import rules
from experiments.reports import Parser
from nestedjax import models
from nestedjax.layers import RuleConfig, SelfModifyingConfig
from nestedjax.layers.self_modifying_config import init_params, rule_of
from nestedjax.run.plots import figure
from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.mlp_memory import FastWeights, mlp_memory, predict

WIDTH, ASKED, LATER = 16, 4, 8  # numbers of a vector, pairs that are asked for, pairs after them
RATES = (0.1, 0.5, 1.0)
SLOWER = 0.1  # of the rate, for the later pairs
KEPT = 0.9  # of a memory a token, where a choice is about decay
SCORES = ("right", "top 2", "cosine")
# Figures of the earlier study: {its rates: (right, cosine)}, by row of the last section.
EARLIER = {
    "delta rule": {1.0: (0.98, 0.93), 0.5: (1.00, 0.94)},
    "published write": {0.1: (0.26, 0.01), 1.0: (0.35, 0.01)},
    "normalised, unit targets, no clip": {0.5: (0.90, 0.25), 1.0: (0.20, 0.17)},
    "same, V not erased": {0.5: (0.91, 0.52), 1.0: (0.47, 0.44)},
    "same, U alone, no DGD": {0.5: (0.94, 0.57), 1.0: (0.87, 0.82)},
    "same, hidden width 4 d": {0.5: (0.99, 0.65), 1.0: (0.97, 0.90)},
}
BASES = ("hope_nano_literal", "hope_nano")


@dataclasses.dataclass(frozen=True)
class Row:
    """One memory and what is done to it.

    Attributes:
      section: of the table.
      name: in its section.
      memory: what is written, and how; None for the delta rule.
      decay: fraction of the memory kept at each token.
      share: of the rates of the table that writes have; 0 writes and erases nothing.
    """

    section: str
    name: str
    memory: SelfModifyingConfig | None
    decay: float = 1.0
    share: float = 1.0


# ---- what is measured


def unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def written(
    memory: SelfModifyingConfig, start: dict, tokens: dict[str, Any], chunk: int
) -> tuple[Any, jax.Array]:
    """Write all tokens into one memory: the targets [T, d], and M(k) of the first keys [ASKED, d].

    Args:
      memory: what is written, and how.
      start: its matrices, [1, f, d] and [1, d, f].
      tokens: keys, values [T, d], learning_rate, decay [T].
      chunk: tokens between two writes.
    """
    pair = start.get("inner"), start["outer"]
    momenta: tuple[Any, ...] = (None, None)
    momentum = None
    if memory.momentum:  # its coefficient starts at a half in a model
        momenta = tuple(None if w is None else jnp.zeros_like(w) for w in pair)
        momentum = jnp.full_like(tokens["decay"], 0.5)
    rule = rule_of(dataclasses.replace(memory, read="anchor"), {})
    # Asked for the values at a chunk's start, a memory says the targets that the chunk writes.
    reads, final = mlp_memory(
        **tokens,
        initial=FastWeights(*pair, *momenta),
        momentum=momentum,
        queries=tokens["values"],
        rule=rule,
        chunk_size=chunk,
    )
    columns = tokens["keys"][:ASKED].T[None, None]  # one head, one memory
    said = predict(jax.tree.map(lambda w: w[None], final), columns, rule).out[0, 0].T
    return tokens["values"] if memory.rule.values == "shared" else reads, said


def scores(said: jax.Array, moved: jax.Array | None, targets: jax.Array) -> dict[str, jax.Array]:
    """How each question is answered, [ASKED]: `SCORES`, and whether its answer is finite.

    Args:
      said: M(k) of the keys that are asked for, [ASKED, d].
      moved: M(k) - k, or None for a memory that starts at zero.
      targets: of all pairs, those asked for first, [ASKED + LATER, d].
    """

    def place(said):
        """Targets that are nearer than the own one, and the own one's cosine."""
        cosines = unit(said) @ unit(targets).T
        own = jnp.diagonal(cosines)
        return jnp.sum(cosines > own[:, None], axis=-1), own

    nearer, cosine = place(said)
    right, finite = nearer == 0, jnp.isfinite(cosine)
    if moved is not None:
        right |= place(moved)[0] == 0
    found = {"right": right, "top 2": nearer < 2, "cosine": cosine, "finite": finite}
    return {name: jnp.where(finite, each.astype(jnp.float32), 0.0) for name, each in found.items()}


def one(
    row: Row, chunk: int, start: dict, pairs: jax.Array, rate: jax.Array
) -> dict[str, jax.Array]:
    """The scores of one draw of a start and of pairs, [2, T, d], at one rate."""
    keys, values = pairs
    rates = row.share * rate * jnp.where(jnp.arange(len(keys)) < ASKED, 1.0, SLOWER)
    if row.memory is None:
        zero = jnp.zeros((WIDTH, WIDTH))
        final = delta_rule(keys, -values, rates, erase=rates, initial=zero).final
        return scores(keys[:ASKED] @ final.T, None, values)
    decay = jnp.full_like(rates, row.decay)
    tokens = {"keys": keys, "values": values, "learning_rate": rates, "decay": decay}
    targets, said = written(row.memory, start, tokens, chunk)
    return scores(said, said - keys[:ASKED], targets)


@functools.cache
def drawn(sizes: SelfModifyingConfig | None, draws: int, seed: int) -> tuple[dict, jax.Array]:
    """Starts of a memory of these sizes, and pairs: [draws, ...]; pairs are the same for all."""
    of_pairs, of_starts = jax.random.split(jax.random.key(seed))
    pairs = unit(jax.random.normal(of_pairs, (draws, 2, ASKED + LATER, WIDTH)))
    if sizes is None:
        return {}, pairs
    keys = jax.random.split(of_starts, draws)
    return jax.vmap(lambda key: init_params(key, sizes)["memory"])(keys), pairs


def measure(row: Row, *, draws: int, chunk: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """Every score of a row, [rates, draws, ASKED]."""
    sizes = None
    if row.memory is not None:  # only these, so that memories written differently share starts
        names = "heads", "head_dim", "hidden", "architecture", "inner_scale"
        sizes = SelfModifyingConfig(**{name: getattr(row.memory, name) for name in names})
    # Drawn outside of what is compiled for each row: random numbers take longer to compile.
    starts, pairs = drawn(sizes, draws, seed)
    over_draws = jax.vmap(functools.partial(one, row, chunk), (0, 0, None))
    over_rates = jax.jit(jax.vmap(over_draws, (None, None, 0)))
    return jax.tree.map(np.asarray, over_rates(starts, pairs, jnp.array(RATES)))


# ---- the rows


def preset(name: str) -> SelfModifyingConfig:
    """The memory of a preset: one head of the probe's width."""
    memory = cast(models.HopeConfig, models.PRESETS[name]).memory
    return dataclasses.replace(memory, heads=1, head_dim=WIDTH, hidden=WIDTH)


def changes(base: SelfModifyingConfig) -> list[dict[str, Any]]:
    """What is changed alone: each other choice of the rule's menus, and of the memory's."""
    found: list[dict[str, Any]] = []
    for field in dataclasses.fields(RuleConfig):
        for choice in rules.MENU[field.name]:
            if field.name == "inner_clip":
                continue  # with each "clip"
            if field.name == "clip":  # of what, says nothing without a bound
                found.append({"inner_clip": 1.0, "clip": choice})
            elif field.name == "decay_to":  # nor to what, without a decay
                found.append({"decay": KEPT, "decay_to": choice})
            elif choice != getattr(base.rule, field.name):
                found.append({field.name: choice})
    for choice in rules.MENU["architecture"]:
        if choice != base.architecture:
            found.append({"architecture": choice})
    sizes: list[dict[str, Any]] = [
        {"hidden": 4 * WIDTH},
        {"inner_scale": 0.25},
        {"inner_scale": 4.0},
    ]
    return [*found, *sizes, {"momentum": not base.momentum}]


def changed(section: str, base: SelfModifyingConfig, change: dict[str, Any]) -> Row:
    """The row of a change; its name is the change.

    Raises:
      ValueError: the library refuses the combination; the message says why.
    """
    settings = {n: v for n, v in change.items() if n != "decay"}
    memory = rules.changed(base, **settings)
    return Row(section, named(change), memory, change.get("decay", 1.0))


def named(change: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in change.items())


def rows() -> tuple[list[Row], list[dict[str, str]]]:
    """All rows of the table, and what the library refuses: section, name, reason."""
    section = "presets"
    found = [Row(section, name, preset(name)) for name in (*BASES, "hope_linear_nano")]
    found += [Row(section, "delta rule", None)]
    found += [Row(section, "hope_nano, nothing written", preset("hope_nano"), share=0.0)]
    refused = []
    for name in BASES:
        section, base = f"{name} with", preset(name)
        for change in changes(base):
            try:
                found.append(changed(section, base, change))
            except ValueError as error:
                refused.append({"section": section, "name": named(change), "reason": str(error)})
    return found + earlier(), refused


def earlier() -> list[Row]:
    """The writes of the earlier study."""
    section = "earlier study"
    base = dataclasses.replace(preset("hope_nano_literal"), rule=RuleConfig())
    fraction = {"step": "normalised", "targets": "unit", "inner_clip": None}
    once = fraction | {"written": "outer", "dgd": "none"}
    made: Sequence[dict[str, Any]] = (
        {},
        fraction,
        fraction | {"dgd": "output_only"},
        once,
        once | {"hidden": 4 * WIDTH},
    )
    of = [changed(section, base, change) for change in made]
    memories = [None, *(row.memory for row in of)]
    return [Row(section, n, m) for n, m in zip(EARLIER, memories, strict=True)]


# ---- what comes out


def summary(row: Row, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """A row of `storage.json`: means over draws and questions, and their standard errors."""
    about: dict[str, Any] = {"section": row.section, "name": row.name, "decay": row.decay}
    about["rule"] = None if row.memory is None else dataclasses.asdict(row.memory.rule)
    for name in (*SCORES, "finite"):
        of_draws = found[name].mean(axis=2)
        about[name] = of_draws.mean(axis=1).tolist()
        about[f"{name}, error"] = (of_draws.std(axis=1) / of_draws.shape[1] ** 0.5).tolist()
    return about


def compare(*, draws: int, chunk: int = 1, seed: int = 0) -> dict[str, Any]:
    """What `storage.json` holds; a row is "idle" if it is as its section's base is."""
    made, refused = rows()
    found, bases = [], {}
    for row in made:
        each = measure(row, draws=draws, chunk=chunk, seed=seed)
        if row.section == "presets":
            bases[row.name] = each["cosine"]
        base = bases.get(row.section.removesuffix(" with"))
        idle = base is not None and np.allclose(each["cosine"], base, atol=1e-3)
        found.append(summary(row, each) | {"idle": idle})
    about = {"draws": draws, "chunk": chunk, "seed": seed, "rates": RATES}
    return about | {"rows": found, "refused": refused}


def joined(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def report(found: dict[str, Any]) -> str:
    """The table, a part a section; then the rows that change nothing, and those refused."""
    lines, rates = [], " / ".join(f"{rate:g}" for rate in found["rates"])
    for section in dict.fromkeys(row["section"] for row in found["rows"]):
        own = [row for row in found["rows"] if row["section"] == section]
        more = ["earlier: right", "earlier: cosine"] if section == "earlier study" else []
        head = [f"{section}; rate {rates}", *SCORES, *more]
        lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in own:
            if row["idle"]:
                continue
            cells = [row["name"], *(joined(row[name]) for name in SCORES)]
            if min(row["finite"]) < 1:
                cells[0] += f" (finite: {joined(row['finite'])})"
            for index in range(len(more)):
                then = EARLIER[row["name"]]
                pair = [f"{then[r][index]:.2f}" if r in then else "-" for r in found["rates"]]
                cells.append(" / ".join(pair))
            lines.append(f"| {' | '.join(cells)} |")
        idle = [row["name"] for row in own if row["idle"]]
        lines += ["", f"The same as {section.split()[0]}: {'; '.join(idle)}."] if idle else []
        no = [r for r in found["refused"] if r["section"] == section]
        lines += ["", "Refused:"] if no else []
        lines += [f"* {r['name']}: {r['reason']}" for r in no]
    return "\n".join(lines[1:])


def plot(found: dict[str, Any], path: Path) -> None:
    """Right answers and cosine by choice: a row of panels a base, a colour a rate."""
    tables = []
    for name in BASES:
        own = [r for r in found["rows"] if r["section"] == f"{name} with" and not r["idle"]]
        tables.append([next(r for r in found["rows"] if r["name"] == name), *own])
    heights = [len(own) + 1 for own in tables]
    picture, axes = figure(
        8.4, 0.2 * sum(heights) + 1.5, rows=2, columns=2, sharey="row", height_ratios=heights
    )
    for name, own, panels in zip(BASES, tables, axes, strict=True):
        for score, axis in zip(("right", "cosine"), panels, strict=True):
            for index, rate in enumerate(found["rates"]):
                color = ("#b9cbe4", "#2f5d9e", "#d1602a")[index]
                values = [row[score][index] for row in own]
                axis.plot(values, range(len(own)), "o", color=color, label=f"rate {rate:g}")
                axis.axvline(values[0], color=color, linewidth=0.7)
            axis.set_title(f"{name}, one choice changed: {score}", loc="left", fontsize=9)
            axis.grid(True, axis="y", color="#e8e8e8", linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlim(-0.12 if score == "cosine" else -0.03, 1.03)
        panels[0].axvline(1 / 6, color="#222222", linewidth=0.8, linestyle=":")
        panels[0].set_yticks(range(len(own)), ["as it is", *(r["name"] for r in own[1:])])
        panels[0].invert_yaxis()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    picture.legend(
        handles,
        labels,
        title="lines: nothing changed; dotted: chance",
        loc="outside lower center",
        ncols=len(labels),
        frameon=False,
    )
    picture.savefig(path)


def count(text: str) -> int:
    if not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)


def main() -> None:
    parser = Parser(prog="python -m experiments.storage", description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=count, default=200)
    parser.add_argument("--chunk", type=count, default=1, help="tokens between two writes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/storage"))
    given = parser.parse_args()
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        found = compare(draws=given.draws, chunk=given.chunk, seed=given.seed)
        (given.out / "storage.json").write_text(json.dumps(found, indent=1) + "\n")
        plot(found, given.out / "storage.png")
    except OSError as error:
        parser.error(str(error))
    print(report(found))


if __name__ == "__main__":
    main()
