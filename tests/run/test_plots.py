"""Pictures of runs."""

import pytest

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
    with pytest.raises(ValueError, match="no recorded step yet"):
        plot_losses(tmp_path, tmp_path / "loss.png", title="toy")


def test_a_figure_leaves_matplotlibs_global_state_alone():
    from matplotlib import _pylab_helpers

    picture, axes = figure(4, 3, columns=2)
    assert axes.shape == (2,) and picture.get_size_inches().tolist() == [4, 3]
    assert not _pylab_helpers.Gcf.figs
