"""`docs/extending.md`: an architecture in one module of the user's own works everywhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()

TRAIN = """
import sys, deepnet, nestedjax as nj
run = nj.run_preset(
    deepnet.DeepNetConfig(256, 16, 1, 16, heads=2), {"chunk_size": 8}, batch=4, length=32,
    steps=int(sys.argv[1]), learning_rate=0.01, warmup=2, checkpoint_every=10, validate_every=10,
    files=(sys.argv[2],), validation_batches=1,
)
result = nj.train(run, "run")
print(result.trained.step, result.record["val_loss"])
"""
USE = """
import json, sys, nestedjax as nj
from nestedjax import levels
assert "deepnet" not in sys.modules
trained = nj.load("run", modules=["deepnet"])
text = nj.generate(trained, "To be", tokens=8, temperature=0.0, seed=1)
found = nj.evaluate(trained, [sys.argv[1]])
boxes = [box.name for box in levels.describe(trained.model)]
print(json.dumps([trained.step, text, found.loss, boxes]))
"""


def module_of_the_page():
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return next(block for block in blocks if "class DeepNetConfig" in block)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("own")
    (found / "deepnet.py").write_text(module_of_the_page())
    (found / "book.txt").write_text("To be, or not to be, that is the question. " * 200)
    return found


def python(folder, code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{folder}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_is_short():
    assert len(module_of_the_page().splitlines()) < 60


@pytest.mark.slow
def test_an_architecture_in_a_module_of_ones_own(folder):
    """Trains 10 steps, 10 more in a new process, loads, evaluates, generates, is described."""
    first = python(folder, TRAIN, "10", "book.txt").split()
    last = python(folder, TRAIN, "20", "book.txt").split()
    assert (first[0], last[0]) == ("10", "20") and float(last[1]) < float(first[1]) - 0.2
    step, text, loss, boxes = json.loads(python(folder, USE, "book.txt"))
    assert step == 20 and len(text) == 8 and loss < 4
    assert {"residual_mlp.l2.decay.delta+momentum", "memory starts", "gates"} <= set(boxes)
    saved = json.loads((folder / "run" / "config.json").read_text())
    assert saved["model"]["type"] == "deepnet:DeepNetConfig"
