"""A run of seconds, and running commands in this process."""

from nestedjax.cli import main

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
    return err
