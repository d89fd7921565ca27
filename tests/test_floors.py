"""The floors of the tree: nothing imports from its own height or above, no configuration climbs.

The first half reads the imports. The second follows a run: from the command line to the models a
configuration is handed down, never up; and it counts the files that a batch passes.
"""

import ast
from pathlib import Path

import pytest

from tests import path as followed
from tests.cli.tiny import HOPE, RUN, flags
from tests.run import tiny

ROOT = Path(__file__).parents[1]

# The longest prefix that fits decides. A module may import from lower floors and its own folder.
FLOORS = {
    "pallas_kernels": 0,
    "nestedjax.errors": 0,
    "nestedjax.fingerprints": 0,
    "nestedjax.checkpoint_leaves": 1,
    "nestedjax.levels": 1,
    "nestedjax.sharding": 1,
    "nestedjax.data": 1,
    "nestedjax.checkpoint": 2,
    "nestedjax.fields": 1,
    "nestedjax.version": 1,
    "nestedjax.memory": 2,
    "nestedjax.optim": 3,
    "nestedjax.layers": 4,
    "nestedjax.models": 5,
    "nestedjax.training": 6,
    "nestedjax.evaluation": 6,
    "nestedjax.run": 7,
    "nestedjax.planning": 7,
    "nestedjax.benchmarks": 8,
    "nestedjax.cli": 9,
    "nestedjax": 10,
    "nestedjax.__main__": 10,
}

# Lower, and still not to be known: these take functions.
NEVER = {"nestedjax.training": ("nestedjax.models",), "nestedjax.evaluation": ("nestedjax.models",)}

# Third-party modules that stay in one place (`from x import y` and `import x.y` alike).
ONLY_IN = {
    "grain": ("nestedjax.data",),
    "orbax": ("nestedjax.checkpoint",),
    "flax": ("nestedjax.layers", "nestedjax.models"),
    "cyclopts": ("nestedjax.cli",),
    "msgspec": ("nestedjax.run",),
}


def modules():
    for package in ("nestedjax", "pallas_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def inside(module, prefix):
    return module == prefix or module.startswith(prefix + ".")


def home(module):
    """The entry of FLOORS that a module belongs to, None for foreign modules."""
    return max((f for f in FLOORS if inside(module, f)), key=len, default=None)


def imports(tree, module, is_package):
    """Every module named by an import anywhere in the file, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                base = module.split(".")[: len(module.split(".")) - node.level + is_package]
                source = ".".join([*base, *filter(None, [source])])
            known = {name for name, _ in modules()}
            for alias in node.names:  # `from nestedjax import levels` imports nestedjax.levels
                inner = f"{source}.{alias.name}"
                yield (inner if inner in known else source), node.lineno


def violations(module, source, is_package=False):
    tree = ast.parse(source)
    here = home(module)
    for target, line in imports(tree, module, is_package):
        there = home(target)
        if there is not None and there != here and FLOORS[there] >= FLOORS[here]:
            yield f"{module}:{line} imports {target} (floor {FLOORS[there]} into {FLOORS[here]})"
        if any(inside(target, shunned) for shunned in NEVER.get(here, ())):
            yield f"{module}:{line} imports {target}; take a function instead"
        for package, homes in ONLY_IN.items():
            if inside(target, package) and not any(inside(module, h) for h in homes):
                yield f"{module}:{line} imports {target}, which belongs in {', '.join(homes)}"
    if here == "nestedjax.cli":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "print":
                yield f"{module}:{node.lineno} prints; only nestedjax.cli does"


@pytest.mark.parametrize(
    "module,path", list(modules()), ids=lambda value: str(value).split("/")[-1]
)
def test_floors(module, path):
    found = list(violations(module, path.read_text(), path.name == "__init__.py"))
    assert not found, "\n".join(found)


def test_every_folder_has_a_floor():
    folders = {module for module, path in modules() if path.name == "__init__.py"}
    assert {home(module) for module in folders} <= set(FLOORS)
    unplaced = [m for m, _ in modules() if home(m) == "nestedjax" and m != "nestedjax"]
    assert not unplaced, f"give {unplaced} a floor in DESIGN and here"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pallas_kernels.delta_rule.xla", "from nestedjax.levels import Level"),
        ("nestedjax.levels.run", "import nestedjax.memory"),
        ("nestedjax.memory.product", "def f():\n    from nestedjax.layers import attention"),
        ("nestedjax.layers.attention", "from nestedjax.models import build"),
        ("nestedjax.training.loop", "from nestedjax import models"),
        ("nestedjax.training.loop", "from nestedjax.evaluation import perplexity"),
        ("nestedjax.levels.run", "import nestedjax"),
        ("nestedjax.levels.run", "from ..layers import attention"),
        ("nestedjax.training.state", "from flax import nnx"),
        ("nestedjax.run.assemble", "def f():\n    from flax import nnx"),
        ("nestedjax.models.build", "import orbax.checkpoint as ocp"),
        ("nestedjax.training.loop", "import grain.python"),
        ("nestedjax.data.dataset", "print(1)"),
        ("nestedjax.run.settings", "import cyclopts"),
        ("nestedjax.cli.train", "import msgspec"),
    ],
)
def test_the_test_can_fail(module, source):
    assert list(violations(module, source))


def test_what_is_allowed():
    fine = "import jax\nfrom nestedjax.levels import run\nfrom nestedjax.memory import state\n"
    assert not list(violations("nestedjax.memory.product", fine))
    assert not list(violations("nestedjax.models.hope", "from flax import nnx"))
    assert not list(violations("nestedjax.cli", "import cyclopts\nprint(1)"))


# ---- The second half: from the command line to the models

CONFIGURATIONS = ("RunConfig", "DataConfig", "OptimizerConfig")
FILES = 50  # that a batch passes from `data[step]` to the updated state; `python -m tests.path`


def climbs(handed):
    """The calls that hand a configuration to a higher floor."""
    return [
        f"{caller} hands a {kind} up to {callee}"
        for caller, callee, kind in handed
        if FLOORS[home(callee)] > FLOORS[home(caller)]
    ]


def test_only_the_run_layer_and_what_calls_it_know_a_run():
    for module, path in modules():
        names = {
            getattr(n, "id", getattr(n, "attr", None))
            for n in ast.walk(ast.parse(path.read_text()))
        }
        if names & {*CONFIGURATIONS}:
            assert FLOORS[home(module)] >= FLOORS["nestedjax.run"], module


@pytest.mark.slow
def test_a_configuration_goes_down_only(tmp_path):
    from nestedjax import models, run

    handed = followed.of_a_run(*flags(*HOPE, *RUN, "--steps", "2"))
    assert climbs(handed) == []
    kinds = {(home(callee), kind) for _, callee, kind in handed}
    assert {("nestedjax.run", "RunConfig"), ("nestedjax.models", "HopeConfig")} <= kinds
    follower = followed.Followed()
    config = run.run_preset("transformer_nano")
    # A lower floor that calls back: as `models.abstract(lambda: new_model(config))` once did.
    follower.follow(
        lambda: models.abstract(lambda: run.build(config) and models.create(config.model))
    )
    modules_of = [(followed.module_of(a), followed.module_of(b), k) for a, b, k in follower.handed]
    assert any("hands a RunConfig up to nestedjax.run" in line for line in climbs(modules_of))


@pytest.mark.slow
def test_the_files_that_a_batch_passes():
    files = followed.of_a_step(tiny.HOPE, **tiny.RUN | {"optimizer": "m3"})
    assert {"nestedjax.data.dataset", "nestedjax.training.step", "nestedjax.optim.m3"} <= {*files}
    assert len(files) <= FILES, "\n".join(files)
