"""Values of the wrong type get one line of ours, also without the type checks of the test suite."""

import subprocess
import sys
from pathlib import Path

import nestedjax as nj
from tests.run.tiny import RUN, TRANSFORMER

PROGRAM = """
import dataclasses, sys
import nestedjax as nj

trained = nj.load(sys.argv[1])
calls = {
    "files=3 is a int": lambda: nj.run_preset("hope_nano", files=3),
    "files=''": lambda: nj.run_preset("hope_nano", files=""),
    "files={'a': 1} is a dict": lambda: nj.run_preset("hope_nano", files={"a": 1}),
    "tokenizer=''": lambda: nj.run_preset("hope_nano", tokenizer=""),
    "tokenizer=3": lambda: nj.run_preset("hope_nano", tokenizer=3),
    "files=5 is a int": lambda: nj.evaluate(trained, 5),
    "files={'a'} is a set": lambda: nj.evaluate(trained, {"a"}),
    "no text file given": lambda: nj.evaluate(trained, []),
    "trained is 'a'": lambda: nj.evaluate("a"),
    "the prompt is 3, a int; give text": lambda: nj.generate(trained, 3),
    "the prompt is b'a', a bytes": lambda: nj.generate(trained, b"a"),
    "the prompt is empty": lambda: nj.generate(trained, ""),
    "the prompt is not UTF-8 at character 1": lambda: nj.generate(trained, "a\\udcff"),
    "trained is 3; load a run": lambda: nj.generate(3),
    "tokens=-1 must be at least 1": lambda: nj.generate(trained, tokens=-1),
    "tokens='a' must be a whole number": lambda: nj.generate(trained, tokens="a"),
    "tokens=1.5 must be a whole number": lambda: nj.generate(trained, tokens=1.5),
    "tokens=True must be a whole number": lambda: nj.generate(trained, tokens=True),
    "top_k='a' must be a whole number": lambda: nj.generate(trained, top_k="a"),
    "seed=None must be a whole number": lambda: nj.generate(trained, seed=None),
    f"seed={2**70} must be less than 2^32": lambda: nj.generate(trained, seed=2**70),
    "temperature='a' must be 0 or more": lambda: nj.generate(trained, temperature="a"),
    "temperature=nan must be 0 or more": lambda: nj.generate(trained, temperature=float("nan")),
    "temperature=inf must be 0 or more": lambda: nj.generate(trained, temperature=float("inf")),
    "folder is 3": lambda: nj.load(3),
    "folder is ''": lambda: nj.load(""),
    "no run in missing": lambda: nj.load("missing"),
    "is a file, not a run folder": lambda: nj.load(sys.argv[1] + "/config.json"),
    "https://a/b is not read from the web": lambda: nj.load("https://a/b"),
    "folder is ''": lambda: nj.train(trained.run, ""),
}
for says, call in calls.items():
    try:
        call()
    except ValueError as error:
        assert says in str(error) and "\\n" not in str(error), (says, error)
    else:
        raise AssertionError(f"nothing was raised: {says}")
"""


def test_wrong_types_get_one_line(tmp_path):
    run = nj.run_preset("transformer_nano", TRANSFORMER, **{**RUN, "steps": 1})
    nj.train(run, tmp_path / "run")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
