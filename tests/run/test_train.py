"""`nj.train`, `load`, `generate`, `evaluate`: one way to run a model, also on data of one's own."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nestedjax as nj
from nestedjax import models, optim, run
from nestedjax.checkpoint import CheckpointError, Checkpoints
from nestedjax.data import DataError
from nestedjax.errors import RunWarning
from nestedjax.run import ConfigError
from nestedjax.run.data import OwnData
from nestedjax.training import Stepped, TrainingError, read_metrics
from tests.run.tiny import HOPE, RUN, TRANSFORMER, Counting

OWN = {"vocab": 16, **TRANSFORMER}


def words(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    keys = (jax.tree_util.keystr(path) for path, _ in leaves)
    plain = (
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for _, x in leaves
    )
    return {key: np.asarray(x).tobytes() for key, x in zip(keys, plain, strict=True)}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run on data of the caller's own, its folder and what came out."""
    folder = tmp_path_factory.mktemp("runs") / "own"
    config = nj.run_preset("transformer_nano", OWN, **RUN)
    result = nj.train(config, folder, data=Counting(), valid_data=[Counting()[9]])
    return config, folder, result


def test_the_callers_own_arrays_are_trained_on(own):
    _, folder, result = own
    records = read_metrics(folder)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6] and result.stopped_by is None
    assert [r["step"] for r in records if "val_loss" in r] == [3, 6]
    assert records[0]["tokens"] == 64 and records[-1]["val_loss"] < records[0]["loss"]
    assert result.record == records[-1] and result.trained.step == 6
    logits, _ = result.trained.model(jnp.asarray(Counting()[9]["tokens"], jnp.int32))
    losses = run.token_losses(logits, jnp.asarray(Counting()[9]["targets"], jnp.int32))
    np.testing.assert_allclose(losses.mean(), result.record["val_loss"], rtol=1e-5)


def test_a_run_taken_back_ends_to_the_last_bit_the_same(own, tmp_path):
    config, folder, result = own
    copy = shutil.copytree(folder, tmp_path / "copy")
    for step in (4, 6):
        shutil.rmtree(copy / "checkpoints" / str(step))
    again = nj.train(config, copy, data=Counting(), valid_data=[Counting()[9]])
    assert words(again.state) == words(result.state)
    assert (copy / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_loading_reads_the_weights_alone(own, tmp_path, monkeypatch):
    _, folder, result = own

    def never(*_, **__):
        raise AssertionError("loading makes no optimizer")

    monkeypatch.setattr("nestedjax.run.assemble.init_state", never)
    monkeypatch.setattr(models, "optimizer", never)
    trained = nj.load(folder)
    assert trained.step == 6 and trained.run.given == ("data",)
    assert words(models.weights(trained.model)) == words(result.state.params)
    # The state of the optimizer may be damaged, or another one's.
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["optimizer"] |= {"name": "soap", "arguments": {"refresh": 3}}
    (copy / "config.json").write_text(json.dumps(config))
    assert words(models.weights(nj.load(copy).model)) == words(result.state.params)


def test_a_part_of_a_checkpoint_is_checked_too(own):
    _, folder, result = own
    with Checkpoints(folder / "checkpoints") as checkpoints:
        params = result.state.params
        some = checkpoints.restore(params, part="params")
        assert words(some.state) == words(params)
        with pytest.raises(CheckpointError, match="has no leaf params.more"):
            checkpoints.restore({"more": jnp.ones(2)}, part="params")
        with pytest.raises(CheckpointError, match="has a leaf params.+ that is not wanted here"):
            checkpoints.restore({}, part="params")


def test_what_continues_is_the_same_run(own, tmp_path):
    config, folder, _ = own
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    more = {"data": Counting()}
    changed = run.replaced(config, {"width": 8})
    for given, arguments, says in (
        (changed, more, "width was 16 when this run began, and cannot become 8"),
        (run.replaced(config, {"steps": 5}), more, "steps=5 is less than the run's 6"),
        (nj.run_preset(config.model, **RUN), more, "holds a transformer_nano, not a nestedjax"),
        (config, {}, "this run was trained with data given in Python; give the same again"),
        (config, {**more, "loss": lambda logits, batch: 0}, "was trained with data given in"),
        (config, {"data": Counting(name="other")}, "data was counting, is other"),
    ):
        with pytest.raises((ConfigError, DataError), match=says):
            nj.train(given, folder, **arguments)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    longer, copy = run.replaced(config, {"steps": 8}), shutil.copytree(folder, tmp_path / "g")
    with pytest.warns(RunWarning, match="step 7 is 0.00525 and was to be 0.0005.*from 6 to 8"):
        assert nj.train(longer, copy, **more).trained.step == 8


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (Counting(name=""), "the data has no fingerprint"),
        (Counting(vocab=17), "tokens are from 0 to 16, and the model's are from 0 to 15"),
        (Counting(batch=8), "has 8 rows of 16 tokens, and the run takes 4 of 16; give batch=8"),
        (Counting(mask=np.ones((4, 3), bool)), r"mask is \[4, 3\], tokens \[4, 16\]"),
        (Counting(tokens=np.zeros((4, 16))), "tokens is float64.*not integer"),
        (Counting(mask=0.5 * np.ones((4, 16))), "mask has values other than 0 and 1"),
        (
            Counting(tokens=np.full((4, 16), 2**63, np.uint64)),
            "tokens are from 9223372036854775808",
        ),
        (Counting(name={"a": {1}}), "fingerprint cannot be JSON"),
        (Counting(name=lambda: 0), "give a string or a mapping"),
    ],
)
def test_batches_of_another_form_are_refused_before_anything_is_written(data, says, tmp_path):
    config = nj.run_preset("transformer_nano", OWN, **RUN)
    with pytest.raises(DataError, match=says):
        nj.train(config, tmp_path / "run", data=data)
    assert not (tmp_path / "run").exists()


def test_a_reset_inside_a_chunk_is_refused(tmp_path):
    small = {"layers": 1, "width": 16, "hidden": 8, "chunk_size": 8, "vocab": 16}
    config = nj.run_preset("deltanet_nano", small, **RUN)
    for place, fine in ((8, True), (5, False)):
        resets = np.zeros((4, 16), bool)
        resets[1, place] = True
        data = OwnData(Counting(resets=resets), vocab=16, shape=(4, 16), period=8)
        if fine:
            assert data[0]["resets"][1, place]
        else:
            with pytest.raises(DataError, match="a reset stands 5 tokens after a boundary"):
                nj.train(config, tmp_path / "run", data=Counting(resets=resets))


def test_no_validation_data_and_a_dtype_that_is_not_computed_are_refused(tmp_path):
    config = nj.run_preset("transformer_nano", OWN, **RUN)
    with pytest.raises(DataError, match="valid_data is list"):
        nj.train(config, tmp_path / "r", data=Counting(), valid_data=[])
    with pytest.raises(ConfigError, match="dtype=float64 would be computed in float32"):
        nj.train(run.replaced(config, {"dtype": "float64"}), tmp_path / "r", data=Counting())


def test_a_loss_of_ones_own_weighs_each_target(tmp_path):
    """Targets that the mask leaves out may be anything; twice the weight is twice the loss."""
    config = nj.run_preset("transformer_nano", OWN, **{**RUN, "steps": 1, "microbatches": 2})
    mask = np.arange(16) < 8
    targets = np.where(mask, Counting()[0]["targets"], -100)
    batch = {"mask": np.broadcast_to(mask, (4, 16)), "weight": 2 * np.ones((4, 16), np.float32)}
    data = Counting(targets=targets, **batch)

    def loss(logits, batch):
        return batch["weight"] * run.token_losses(logits, batch["targets"])

    records = []
    for name, given in (("plain", None), ("twice", loss)):
        nj.train(config, tmp_path / name, data=data, loss=given)
        records.append(read_metrics(tmp_path / name)[0])
    assert records[0]["tokens"] == 32
    assert records[1]["loss"] == pytest.approx(2 * records[0]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "error", "says"),
    [
        (
            lambda logits, batch: logits.sum(),
            ConfigError,
            r"returned float32\[\]; return the loss of",
        ),
        (lambda logits, batch: None, ConfigError, "returned NoneType; return the loss of each"),
        (lambda logits, batch: (logits, 1), ConfigError, "returned tuple"),
        (lambda logits, batch: batch["targets"], ConfigError, r"returned int32\[4, 16\]"),
        (lambda logits, batch: batch["weight"], KeyError, "weight"),
    ],
)
def test_a_loss_that_fails_leaves_nothing_behind(loss, error, says, tmp_path):
    config = nj.run_preset("transformer_nano", OWN, **{**RUN, "steps": 1})
    with pytest.raises(error, match=says):
        nj.train(config, tmp_path / "run", data=Counting(), loss=loss)
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_saved_step_begins_anew(tmp_path):
    """A number that was not finite before the first checkpoint: the corrected run is another."""
    folder, small = tmp_path / "run", {**RUN, "checkpoint_every": 100, "validate_every": 100}
    bad = nj.run_preset("transformer_nano", OWN, **{**small, "learning_rate": 1e15, "clip": None})
    with pytest.raises(TrainingError, match="nothing is saved yet"):
        nj.train(run.replaced(bad, {"warmup": 0}), folder, data=Counting())
    assert read_metrics(folder)
    good = nj.run_preset("transformer_nano", OWN, **{**small, "steps": 2})
    assert nj.train(good, folder, data=Counting()).trained.step == 2
    assert [record["step"] for record in read_metrics(folder)] == [1, 2]
    assert run.load_config(folder).loop.steps == 2
    with pytest.raises(ConfigError, match="learning_rate was 0.01"):
        nj.train(bad, folder, data=Counting())


def test_data_that_ends_or_breaks_keeps_the_steps_before_it(tmp_path):
    config = nj.run_preset("transformer_nano", OWN, **{**RUN, "checkpoint_every": 100})

    class Sized(Counting):
        def __len__(self):
            return 5

    with pytest.raises(DataError, match="the data has 5 batches and the run takes .* steps=6"):
        nj.train(config, tmp_path / "short", data=Sized())
    assert not (tmp_path / "short").exists()

    class Broken(Counting):
        def __getitem__(self, step):
            return [super().__getitem__(step)][step >= 4]

    with pytest.raises(DataError, match="batch 4: the data raised IndexError.*give steps=4"):
        nj.train(config, tmp_path / "run", data=Broken())
    assert nj.load(tmp_path / "run").step == 4
    assert nj.train(config, tmp_path / "run", data=Counting()).trained.step == 6


def test_settings_that_own_data_would_drop_are_refused(own, tmp_path):
    config, folder, _ = own
    for changes, says in (
        ({"files": ("a.txt",)}, "data and files=.*a.txt are both given"),
        ({"context_rows": 4}, "context_rows=4 is a way to read text"),
    ):
        for place in (folder, tmp_path / "new"):
            with pytest.raises(ConfigError, match=says):
                nj.train(run.replaced(config, changes), place, data=Counting())


def test_a_wsd_run_that_grows_before_its_cooldown_is_the_longer_run(tmp_path):
    wsd = {**RUN, "schedule": "wsd", "cooldown": 2, "warmup": 2}
    long = nj.run_preset("transformer_nano", OWN, **wsd)
    short = run.replaced(long, {"steps": 4})
    whole = nj.train(long, tmp_path / "whole", data=Counting())
    nj.train(short, tmp_path / "grown", data=Counting())
    shutil.rmtree(tmp_path / "grown" / "checkpoints" / "4")  # the cooldown began after step 2
    grown = nj.train(long, tmp_path / "grown", data=Counting())
    assert words(grown.state) == words(whole.state)
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "grown")]
    assert files[0] == files[1]
    rates = [record["learning_rate"] for record in read_metrics(tmp_path / "whole")]
    np.testing.assert_allclose(rates, [0, 0.005, 0.01, 0.01, 0.01, 0.00525], rtol=1e-6)


def test_each_row_of_ones_own_data_begins_afresh(tmp_path):
    config = nj.run_preset("hope_nano", {"vocab": 16, **HOPE}, **{**RUN, "steps": 1})
    assert config.data.carries
    result = nj.train(config, tmp_path / "run", data=Counting())
    assert result.state.carry is None


def test_the_model_is_built_once_before_the_first_step(tmp_path, monkeypatch):
    config = nj.run_preset("hope_nano", HOPE, **{**RUN, "steps": 1, "sample_every": 1})
    built, create = [], models.create
    monkeypatch.setattr(models, "create", lambda *a, **k: built.append(a) or create(*a, **k))
    layers, init = [], models.LanguageModel.__init__
    monkeypatch.setattr(
        models.LanguageModel, "__init__", lambda *a, **k: layers.append(1) or init(*a, **k)
    )
    seen = []

    def watch(event):
        if isinstance(event, Stepped):
            seen.append((len(built), len(layers)))

    nj.train(config, tmp_path / "run", on_event=watch)
    assert seen == [(1, 1)]


def test_the_first_weights_are_those_of_the_model():
    """Drawn by a program that was traced once, they are what building the model draws."""
    config = nj.run_preset("hope_nano", HOPE, **RUN)
    drawn = jax.jit(run.build(config).draw)()
    made = jax.jit(lambda: models.weights(models.create(config.model, seed=config.seed)))()
    assert words(drawn) == words(made)


def test_text_is_sampled_where_events_are_watched(tmp_path):
    config = nj.run_preset("transformer_nano", TRANSFORMER, **RUN, sample_every=3)
    events = []
    nj.train(config, tmp_path / "run", on_event=events.append)
    kinds = [type(event).__name__ for event in events]
    assert kinds[:2] == ["Began", "Started"] and events[0].parameters > 0
    assert [e.step for e in events if isinstance(e, run.Sampled)] == [3, 6]


def test_generation_and_evaluation(own, tmp_path):
    config = nj.run_preset("transformer_nano", TRANSFORMER, **RUN)
    trained = nj.train(config, tmp_path / "run").trained
    text = nj.generate(trained, "To be", tokens=20, temperature=0.5, seed=3)
    assert 0 < len(text) <= 20 and not text.startswith("To be")
    assert text == nj.generate(trained, "To be", tokens=20, temperature=0.5, seed=3)
    assert text != nj.generate(trained, "To be", tokens=20, temperature=0.5, seed=4)
    (tmp_path / "a.txt").write_text("To be, or not to be")
    (tmp_path / "b.txt").write_text("that is the question")
    found = nj.evaluate(trained, [tmp_path / "a.txt", tmp_path / "b.txt"])
    assert [losses.total.tokens for losses in found.files.values()] == [18, 19]
    one = nj.evaluate(trained, tmp_path / "a.txt")
    assert one.loss == found.files[str(tmp_path / "a.txt")].total.loss
    assert found.bits_per_byte > 0
    assert set(nj.evaluate(trained).files) == {"valid split", "test split"}
    with pytest.raises(DataError, match="trained on data given in Python; name text files"):
        nj.evaluate(nj.load(own[1]))
    with pytest.raises(ConfigError, match="the prompt has token 111, and the model's end at 15"):
        nj.generate(nj.load(own[1]), "To be")
    with pytest.raises(ConfigError, match="a.txt has token 116, and the model's end at 15"):
        nj.evaluate(nj.load(own[1]), tmp_path / "a.txt")


def test_what_there_is_not(tmp_path):
    with pytest.raises(ConfigError, match="no run in .*nowhere"):
        nj.load(tmp_path / "nowhere")
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ConfigError, match="holds photo.jpg but no run"):
        nj.train(nj.run_preset("transformer_nano"), tmp_path)


@pytest.mark.parametrize("name", optim.menu.OPTIMIZERS)
def test_every_optimizer_fits_hope(name):
    """Shapes only: the state begins, and the update keeps it."""
    config = nj.run_preset("hope_nano", HOPE, **{**RUN, "optimizer": name})
    tx, _ = run.optimizer(config, run.build(config).model)
    state = run.abstract_state(config)
    updates, after = jax.eval_shape(tx.update, state.params, state.opt_state, state.params)
    shapes = [leaf.shape for leaf in jax.tree.leaves(updates)]
    assert shapes == [leaf.shape for leaf in jax.tree.leaves(state.params)]
    assert jax.tree.structure(after) == jax.tree.structure(state.opt_state)
    assert run.from_json(json.loads(json.dumps(run.to_json(config)))) == config
