"""A run of seconds, and running commands in this process."""

import re

import nestedjax as nj
from nestedjax import models, optim, run
from nestedjax.cli import flags as cli_flags
from nestedjax.cli import main

OWN_FLAGS = {f"--{name}" for name in "help run mesh config import prompt tokens adapt plot".split()}
OWN_FLAGS |= {
    "--use",
    "--without-writes",
    "--temperature",
    "--top-k",
    "--periods",
    "--inner-learning-rate",
    "--seed",
    "--json",
}
# Words before "=" that are no settings: axes of a mesh, arguments in Python, keys of config.json.
WORDS = {"data", "fsdp", "tensor", "sequence", "axis", "modules", "type", "layout", "model", "step"}

TEXT = ("To be, or not to be, that is the question: whether 'tis nobler\n" * 200)[:12000]
HOPE = (
    "--layers 1 --width 16 --memory.heads 1 --memory.head-dim 8 --memory.hidden 8"
    " --memory.chunk-size 8 --cms.hidden 16 --cms.periods none 128"
).split()
HOPE_ATTENTION = (
    "--layers 1 --width 16 --attention.heads 2 --attention.context 16 --cms.hidden 16"
    " --cms.periods none 128"
).split()
TRANSFORMER = (  # compiles sooner
    "--layers 1 --width 16 --hidden 16 --attention.heads 2 --attention.context 16"
).split()
RUN = (
    "--length 16 --batch 4 --steps 12 --validate-every 6 --checkpoint-every 4"
    " --steps-per-dispatch 2 --sample-every none --validation-batches 2 --learning-rate 0.01"
    " --optimizer adamw"
).split()


def flags(*changes):
    """Flags, the later ones in place of earlier ones."""
    found: dict = {}
    for token in changes:
        if token.startswith("--"):
            found[(name := token)] = []
        else:
            found[name].append(token)
    return [part for name, values in found.items() for part in (name, *values)]


def command(capsys, *arguments):
    """Run a command: its exit code, standard output and standard error."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *arguments):
    """The one line with which a command refuses its arguments."""
    code, out, err = command(capsys, *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.endswith("\n"), (code, out, err)
    unknown = invented(err, [str(argument) for argument in arguments])
    assert not unknown, f"{unknown} do not exist: {err}"
    return err


def invented(message, arguments):
    """Flags (--x.y) and settings (x.y=) that a message names, and nobody has or has given."""
    preset = next((name for name in arguments if name in models.PRESETS), "hope_nano")
    config, optimizer = nj.run_preset(preset), [*arguments, "--optimizer", "m3"]
    optimizer = optimizer[optimizer.index("--optimizer") + 1]
    if optimizer in optim.menu.OPTIMIZERS:
        config = run.replaced(config, {"optimizer": optimizer})
    names = run.settings(config)
    known = {cli_flags.NAMES.get(n, "--" + n.replace("_", "-")) for n in names} | OWN_FLAGS
    given = " ".join(arguments)
    flags = [flag.rstrip(".") for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", message)]
    settings = re.findall(r"(?<![\w.-])([a-z][a-z_0-9]*(?:\.[a-z_0-9]+)*)=", message)
    ends = {part for name in names for part in (name, name.rpartition(".")[2])} | WORDS
    if "is no run configuration" in message:  # which names keys of a file
        settings = []
    return [f for f in flags if f not in known and f not in given] + [
        s for s in settings if s not in ends and s not in given
    ]
