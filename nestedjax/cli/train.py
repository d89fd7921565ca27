"""Train a model on text, or continue a run: the same command on an existing run folder goes on
where the newest checkpoint left off, and ends as if it had never stopped."""

import argparse
import os
import shlex

EXAMPLE = """example:
  nestedjax train hope_nano --run runs/first
  nestedjax train hope_nano --data book.txt --set steps=200 --set cms.periods=4096,8192,none,none

PRESET is hope_SIZE, hope_attention_SIZE or transformer_SIZE; SIZE is nano, micro, mini, 340m, 760m
or 1p3b. Keys of --set: steps, seed, length, batch, learning_rate, warmup, weight_decay, clip,
checkpoint_every, validate_every, sample_every, steps_per_dispatch, microbatches ..., and those
of the model: layers, memory.chunk_size, cms.periods ... An unknown key lists the near ones.

The run folder gets config.json, checkpoints/, metrics.jsonl, tensorboard/ and loss.png. Continuing
takes its saved settings; only steps (to more), validate_every, checkpoint_every and sample_every
may change, and the --mesh, which is not saved. Ctrl-C and SIGTERM finish the step, save and exit
with 130 and 143.
The last line is: done: step=N val_loss=X.XXXX tokens=N run=DIR (nats per token)"""

STOPPED = {"Ctrl-C": 130}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("preset", metavar="PRESET", help="which model to train")
    parser.add_argument(
        "--data",
        metavar="FILE",
        nargs="+",
        default=[],
        help="text files or folders (.txt, .jsonl, .gz); default: the bundled Shakespeare",
    )
    parser.add_argument("--run", metavar="DIR", help="the run folder; default runs/PRESET")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        nargs="+",
        default=[],
        help="change a setting; may be given several times",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE.model", help="a SentencePiece model; default: bytes"
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="all devices, as data=2,fsdp=2,tensor=2; default: one device",
    )


def main(args: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    from nestedjax import run
    from nestedjax.cli import training
    from nestedjax.sharding import make_mesh

    mesh = None if args.mesh is None else make_mesh(args.mesh)
    folder = args.run or os.path.join("runs", args.preset)
    assignments = [item for group in args.set for item in group]
    saved = run.load_config(folder)
    if saved is None:
        config = training.new_run(args.preset, assignments, args.data, args.tokenizer)
    else:
        config = training.continued(saved, args.preset, assignments, args.data, args.tokenizer)
    result = training.train(config, folder, mesh)
    if result.stopped_by is not None:
        again = shlex.join(["nestedjax", "train", args.preset, "--run", folder])
        step = int(result.state.step)
        print(f"stopped by {result.stopped_by} at step {step}, saved; continue with: {again}")
        return STOPPED.get(result.stopped_by, 143)
    tokens = config.loop.steps * config.step_tokens
    loss = result.record.get("val_loss", float("nan"))
    print(f"done: step={config.loop.steps} val_loss={loss:.4f} tokens={tokens} run={folder}")
    return 0
