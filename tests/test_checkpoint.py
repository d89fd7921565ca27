"""Checkpoints: what was saved comes back to the last bit, or the damage is found and named."""

import gc
import os
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nestedjax.checkpoint import CheckpointError, Checkpoints, CheckpointWarning, SaveError
from nestedjax.fingerprints import fingerprints

# Orbax leaves its failed reads behind as asyncio tasks that complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

RANDOM = np.random.default_rng(0)
DTYPES = ("float32", "bfloat16", "float16", "int32", "int8", "uint8", "uint32", "bool")


def make_tree(step=0):
    """Leaves that Orbax keeps inline, and one that gets a file of its own."""
    return {
        "small": jnp.arange(4, dtype=jnp.float32) + step,
        "inner": {"w": jnp.asarray(np.random.default_rng(step).standard_normal((40, 30)), "f")},
        "half": jnp.full((3, 2), 1.5 + step, jnp.bfloat16),
        "key": jax.random.key(step),
        "step": jnp.asarray(step, jnp.int32),
    }


LEAVES = ("small", "inner.w", "half", "key", "step")


def words(tree):
    def plain(leaf):
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes()

    return jax.tree.map(plain, tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert [x.dtype for x in jax.tree.leaves(a)] == [x.dtype for x in jax.tree.leaves(b)]
    assert words(a) == words(b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the sound steps 1 and 2; copy it before damaging it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_tree(step), meta={"step": step})
    return folder


@pytest.fixture
def debris():
    yield
    gc.collect()  # here, and not in the middle of another test


@pytest.fixture
def copied(saved, tmp_path, debris):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_every_dtype_comes_back_to_the_last_bit(tmp_path):
    tree = {d: jnp.asarray(RANDOM.integers(0, 2, (3, 5)) * 1.0).astype(d) for d in DTYPES}
    tree["special"] = jnp.array([jnp.nan, jnp.inf, -0.0, 1e-45], jnp.float32)
    tree["half special"] = tree["special"].astype(jnp.bfloat16)
    tree["complex"] = jnp.array([1 + 2j, 3 - 1j], jnp.complex64)
    tree["key"] = jax.random.key(3)
    tree["keys"] = jax.random.split(jax.random.key(4), 3)
    tree["rbg"] = jax.random.key(5, impl="rbg")
    tree["scalar"] = jnp.asarray(7)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(3, tree, meta={"note": ["a", 1]})
        restored = checkpoints.restore(tree)
    assert restored.step == 3 and restored.meta == {"note": ["a", 1]}
    assert_same(restored.state, tree)
    assert np.signbit(np.asarray(restored.state["special"])[2])


def test_64_bit_leaves_and_named_tuples(x64, tmp_path):
    from nestedjax.levels.run import Carry

    carry = Carry((jnp.asarray(np.pi, jnp.float64),), None, jnp.asarray(2**40 + 1, jnp.int64))
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, carry, meta={})
        assert_same(checkpoints.restore(carry).state, carry)


def test_leaves_may_be_restored_onto_a_mesh(saved):
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))

    def wanted(leaf):
        sharding = split if leaf.shape[:1] == (40,) else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with Checkpoints(saved) as checkpoints:
        restored = checkpoints.restore(jax.tree.map(wanted, make_tree()))
    assert restored.state["inner"]["w"].sharding == split
    assert_same(restored.state, make_tree(2))


def test_a_fingerprint_sees_every_bit_and_every_swap():
    x = RANDOM.integers(0, 2**31, 64).astype(np.int32)
    base = fingerprints({"x": jnp.asarray(x)})
    for place in (0, 31, 63):
        for bit in (0, 7, 30):
            y = x.copy()
            y[place] ^= 1 << bit
            assert fingerprints({"x": jnp.asarray(y)}) != base
    y = x.copy()
    y[[3, 40]] = x[[40, 3]]
    assert fingerprints({"x": jnp.asarray(y)}) != base
    half = jnp.asarray(x, jnp.float32).astype(jnp.bfloat16)
    assert fingerprints({"x": half}) != fingerprints({"x": half.at[5].multiply(1.01)})
    values = [int(value) for value in x]
    sums = sum(values), sum((i + 1) * value for i, value in enumerate(values))
    assert base["x"] == "".join(f"{total % 2**32:08x}" for total in sums)


def files_of(folder, step=2):
    return sorted(f for f in (folder / str(step)).rglob("*") if f.is_file() and f.stat().st_size)


@pytest.mark.parametrize("where", [0.2, 0.5, 0.9])
def test_one_flipped_bit_in_any_file_is_harmless_or_found(saved, debris, tmp_path, where):
    """A file that holds values is never read wrongly: either the step is right or not used."""
    found, harmless = {}, []
    for index, file in enumerate(files_of(saved)):
        folder = tmp_path / str(index)
        shutil.copytree(saved, folder)
        damaged = folder / file.relative_to(saved)
        data = bytearray(damaged.read_bytes())
        data[int(where * (len(data) - 1))] ^= 1 << 3
        damaged.write_bytes(data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with Checkpoints(folder) as checkpoints:
                restored = checkpoints.restore(make_tree())
        messages = [str(w.message) for w in caught if w.category is CheckpointWarning]
        assert_same(restored.state, make_tree(restored.step))
        if restored.step == 2:
            assert not messages
            harmless.append(file)
        else:
            assert restored.step == 1 and len(messages) == 1
            assert "step 2 is damaged" in messages[0] and "using step 1" in messages[0]
            found[file] = messages[0]
    # The largest file holds the large leaf: damaged, it must be found, and the leaf named.
    largest = max(files_of(saved), key=lambda file: file.stat().st_size)
    assert any(leaf in found[largest] for leaf in LEAVES), found
    assert any(file.name == "metadata" for file in found)
    assert len(found) >= 4


def test_wrong_values_that_load_are_named(copied, monkeypatch):
    """What Orbax reads without a word is caught by the fingerprint."""
    from orbax.checkpoint import CheckpointManager

    read = CheckpointManager.restore

    def flip(self, step, args=None, **options):
        found = read(self, step, args=args, **options)
        if step == 2 and "state" in args.keys():
            state = dict(found["state"])
            bits = np.asarray(state["inner.w"]).view(np.uint32).copy()
            bits[7, 3] ^= 1
            state["inner.w"] = jnp.asarray(bits.view(np.float32))
            return {**dict(found.items()), "state": state}
        return found

    monkeypatch.setattr(CheckpointManager, "restore", flip)
    with Checkpoints(copied) as checkpoints:
        with pytest.warns(CheckpointWarning, match="values of leaf inner.w are not those saved"):
            restored = checkpoints.restore(make_tree())
    assert restored.step == 1
    assert_same(restored.state, make_tree(1))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def edit_meta(file):
    file.write_bytes(file.read_bytes().replace(b'"step": 2', b'"step": 3'))


@pytest.mark.parametrize("damage", ["truncated", "removed", "meta edited"])
def test_damage_falls_back_and_the_next_save_sets_it_aside(copied, damage):
    if damage == "meta edited":
        edit_meta(copied / "2" / "meta" / "metadata")
    else:
        largest = max(files_of(copied), key=lambda file: file.stat().st_size)
        cut(largest) if damage == "truncated" else largest.unlink()
    with Checkpoints(copied) as checkpoints:
        with pytest.warns(CheckpointWarning, match="step 2 is damaged.*using step 1 instead"):
            restored = checkpoints.restore(make_tree())
        assert restored.step == 1 and restored.meta == {"step": 1}
        assert_same(restored.state, make_tree(1))
        checkpoints.save(2, make_tree(7), meta={"step": 2})
        again = checkpoints.restore(make_tree())
    assert again.step == 2
    assert_same(again.state, make_tree(7))
    aside = list((copied.parent / "checkpoints-damaged").iterdir())
    assert [path.name.split("-")[0] for path in aside] == ["2"]  # kept, not deleted


def test_all_damaged_is_an_error_that_says_what_to_do(copied):
    for step in (1, 2):
        edit_meta(copied / str(step) / "meta" / "metadata")
        cut(copied / str(step) / "meta" / "metadata")
    with Checkpoints(copied) as checkpoints:
        with pytest.raises(CheckpointError, match="no checkpoint in .* is whole.*new run folder"):
            checkpoints.restore(make_tree())


def test_an_empty_folder_has_nothing(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(make_tree()) is None and checkpoints.steps() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"extra": jnp.ones(2)}, "has no leaf extra"),
        (lambda t: {k: v for k, v in t.items() if k != "half"}, "has a leaf half that is not want"),
        (
            lambda t: t | {"inner": {"w": jnp.ones((40, 31))}},
            r"leaf inner.w is float32\[40,30\] in .* and float32\[40,31\] here",
        ),
        (
            lambda t: t | {"half": t["half"].astype(jnp.float32)},
            r"leaf half is bfloat16\[3,2\] in .* and float32\[3,2\] here",
        ),
    ],
)
def test_another_model_is_refused_and_the_leaf_named(saved, change, message):
    with Checkpoints(saved) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(change(make_tree()))


def test_empty_leaves_come_back(tmp_path):
    trees = [
        {"empty": jnp.zeros((0, 3)), "none": None, "w": jnp.ones(2)},
        {"keys": jax.random.split(jax.random.key(0, impl="rbg"), 3)[:0], "half": jnp.bfloat16(1)},
        {"empty": jnp.zeros((2, 0), jnp.bfloat16)},
        {},
    ]
    for index, tree in enumerate(trees):
        with Checkpoints(tmp_path / str(index)) as checkpoints:
            checkpoints.save(1, tree, meta={})
            assert_same(checkpoints.restore(tree).state, tree)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        for tree, meta, says in (
            ({"a": {"b": 1.0}}, {}, "leaf a.b is a float.*jnp.asarray"),
            ({"a": np.ones(2)}, {}, "leaf a is a ndarray"),
            ({"a": jnp.ones(2, "uint4")}, {}, "leaf a is uint4, which tensorstore does not store"),
            ({"a": jnp.ones(2)}, {"x": {1}}, "meta data of a checkpoint cannot be JSON"),
        ):
            with pytest.raises(CheckpointError, match=says) as caught:
                checkpoints.save(1, tree, meta=meta)
            assert not isinstance(caught.value, SaveError)
    assert not list((tmp_path / "c").iterdir())


def test_a_folder_that_is_gone_is_not_made_again(tmp_path):
    with Checkpoints(tmp_path / "run" / "c") as checkpoints:
        checkpoints.save(1, make_tree(1), meta={})
        checkpoints.wait()
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(SaveError, match="step 2 could not be written.*the folder is gone"):
            checkpoints.save(2, make_tree(2), meta={})
    assert not (tmp_path / "run").exists()


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "c").touch()
    with pytest.raises(CheckpointError, match="cannot open .*/c .*take another run folder"):
        Checkpoints(tmp_path / "c")


def test_a_reader_follows_a_writer_that_prunes(saved, tmp_path, monkeypatch):
    """The steps that the reader has listed are gone when it reads them: no warning, no error."""
    folder = shutil.copytree(saved, tmp_path / "c")
    with Checkpoints(folder, keep=2) as writer, Checkpoints(folder, read_only=True) as reader:
        read, rounds = Checkpoints._read, iter(((3, 4), (5, 6)))

        def prune(self, step, like, part):
            for number in next(rounds, ()):
                writer.save(number, make_tree(number), meta={})
                writer.wait()
            return read(self, step, like, part)

        monkeypatch.setattr(Checkpoints, "_read", prune)
        assert_same(reader.restore(make_tree()).state, make_tree(6))
    assert not list(folder.parent.glob("*damaged*"))


def test_a_reader_makes_nothing(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "c")
    half = folder / "3.orbax-checkpoint-tmp"
    half.mkdir()
    with Checkpoints(folder, read_only=True) as reader:
        assert reader.restore(make_tree()).step == 2 and half.exists()
    with Checkpoints(folder) as writer:  # the half of a save that was killed
        writer.wait()
    assert not half.exists()


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="keep=1 must be at least 2"):
        Checkpoints(tmp_path, keep=1)
    with Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(CheckpointError, match="two leaves are called a.b"):
            checkpoints.save(1, {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}, meta={})


def test_only_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_tree(step), meta={})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]


def test_a_save_that_fails_in_the_background_surfaces(tmp_path, monkeypatch):
    from orbax.checkpoint import CheckpointManager

    folder = tmp_path / "c"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, make_tree(1), meta={})
        checkpoints.wait()
        finished = CheckpointManager.wait_until_finished

        def broken(self):
            finished(self)
            raise OSError(28, "No space left on device")

        checkpoints.save(2, make_tree(2), meta={})
        monkeypatch.setattr(CheckpointManager, "wait_until_finished", broken)
        with pytest.raises(CheckpointError, match="could not be written to .*No space left.*room"):
            checkpoints.save(3, make_tree(3), meta={})
        with pytest.raises(CheckpointError, match="No space left"):
            checkpoints.wait()
        monkeypatch.setattr(CheckpointManager, "wait_until_finished", finished)
        assert 1 in checkpoints.steps()
        checkpoints.save(4, make_tree(4), meta={})  # the manager was rebuilt: life goes on
        assert checkpoints.restore(make_tree()).step == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_surfaces(tmp_path):
    folder = tmp_path / "c"
    with Checkpoints(folder) as checkpoints:
        folder.chmod(0o500)
        try:
            with pytest.raises(CheckpointError, match="permissions"):
                checkpoints.save(1, make_tree(1), meta={})
                checkpoints.wait()
        finally:
            folder.chmod(0o700)
