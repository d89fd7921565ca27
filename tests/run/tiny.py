"""Models of seconds."""

import numpy as np

HOPE = {
    "layers": 1,
    "width": 16,
    "memory.heads": 1,
    "memory.head_dim": 8,
    "memory.hidden": 8,
    "memory.chunk_size": 8,
    "cms.hidden": 16,
    "cms.periods": (None, 128),
}
HOPE_ATTENTION = {
    "layers": 1,
    "width": 16,
    "attention.heads": 2,
    "attention.context": 16,
    "cms.hidden": 16,
    "cms.periods": (None, 128),
}
TRANSFORMER = {
    "layers": 1,
    "width": 16,
    "hidden": 16,
    "attention.heads": 2,
    "attention.context": 16,
}
RUN = {
    "length": 16,
    "batch": 4,
    "steps": 6,
    "validate_every": 3,
    "checkpoint_every": 2,
    "steps_per_dispatch": 2,
    "learning_rate": 0.01,
    "optimizer": "adamw",
    "validation_batches": 2,
}


class Counting:
    """Rows that count up from a random number, modulo `vocab`: the caller's own data."""

    def __init__(self, *, vocab=16, batch=4, length=16, name="counting", **more):
        self.vocab, self.batch, self.length, self.more = vocab, batch, length, more
        self.fingerprint = name

    def __getitem__(self, step):
        first = np.random.default_rng(step).integers(self.vocab, size=(self.batch, 1))
        rows = (first + np.arange(self.length + 1)) % self.vocab
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:], **self.more}
