"""Pictures of runs."""

import json

import pytest

from nestedjax.errors import ConfigError
from nestedjax.run.plots import figure, plot_losses
from nestedjax.training import MetricsWriter


@pytest.mark.parametrize("validated", [False, True])
def test_the_plot_is_a_png(tmp_path, validated):
    path = tmp_path / "loss.png"
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 30):
            found = {"val_loss": 0.5} if validated else {}
            writer.write({"step": step, "loss": 1 / step} | found, {})
    plot_losses(tmp_path, path, title="toy")
    picture = path.read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 10_000


def test_a_plot_of_nothing_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no recorded step yet"):
        plot_losses(tmp_path, tmp_path / "loss.png", title="toy")


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    losses = [1, None, "x", "NaN", [2], 10**400, 0.5]
    lines = [json.dumps({"step": i, "loss": x, "val_loss": x}) for i, x in enumerate(losses, 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9}\n')
    plot_losses(tmp_path, tmp_path / "loss.png", title="toy")
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_a_picture_that_cannot_be_written_leaves_what_was_there(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    (tmp_path / "loss.png").mkdir()
    with pytest.raises(OSError):
        plot_losses(tmp_path, tmp_path / "loss.png", title="toy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_a_figure_leaves_matplotlibs_global_state_alone():
    from matplotlib import _pylab_helpers

    picture, axes = figure(4, 3, columns=2)
    assert axes.shape == (2,) and picture.get_size_inches().tolist() == [4, 3]
    assert not _pylab_helpers.Gcf.figs
