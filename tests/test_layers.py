"""Tests of what is recorded of each layer: against a slow reference, and drawn."""

from pathlib import Path

import numpy as np
import pytest
from federation import scripted
from finished_runs import make_run
from PIL import Image
from ternary_rounds import LENGTH, walk

from gwpf_baseline.callbacks import Layers
from gwpf_baseline.records.layers import (
    LAYERS_FILE,
    LayerRecord,
    LayerWatch,
    append_layers,
    read_layers,
)
from gwpf_baseline.report.figures import caption, draw_figure
from gwpf_baseline.report.measures import layer_curves
from gwpf_baseline.report.runs import ReportError, read_run


def test_a_window_is_measured_as_the_paper_says() -> None:
    """Parameter by parameter: how far it came over how far it went."""
    rng = np.random.default_rng(0)
    spans = {"weight": slice(0, 5), "bias": slice(5, 8)}
    models = [rng.standard_normal(8).astype(np.float32)]
    watch = LayerWatch(models[0], spans)
    rested = np.zeros(8, bool)
    for window in range(4):
        first = len(models) - 1
        for number in range(3):
            update = rng.standard_normal(8).astype(np.float32)
            update[2] = (1, -1, 0.001)[number]  # there and back
            update[6] = 0  # never moves
            model = models[-1] + update
            model[4] = 0
            models.append(model)
            watch.see(models[-1])
        came = np.abs(models[-1] - models[first])
        went = sum(
            np.abs(models[k] - models[k - 1]) for k in range(first + 1, first + 4)
        )
        perturbation = [c / w if w else 0.0 for c, w in zip(came, went, strict=True)]
        rested |= np.array(perturbation) < 0.01
        weight, bias = watch.close(3 * window + 3)
        for record, span in ((weight, spans["weight"]), (bias, spans["bias"])):
            assert record.round == 3 * window + 3
            assert record.parameters == span.stop - span.start
            assert record.perturbation == pytest.approx(np.mean(perturbation[span]))
            assert record.stabilised == pytest.approx(rested[span].mean())
        assert (weight.value, bias.value) == (models[-1][2], models[-1][6])
        assert weight.nonzero == pytest.approx(0.8) and bias.nonzero == 1
    assert rested[2] and rested[6] and not rested.all()


def test_a_run_leaves_a_row_for_each_layer_and_window(tmp_path: Path) -> None:
    """Of this run alone, whatever was in the folder."""
    (tmp_path / LAYERS_FILE).write_text("of another run\n")
    federation = scripted("fedavg", walk)
    strategy = federation.strategy
    strategy.callbacks.append(Layers(strategy, tmp_path, every=2))
    federation.play(5)
    records = read_layers(tmp_path / LAYERS_FILE)
    names = [name for name, _ in strategy.model.named_parameters()]
    assert [(r.round, r.layer) for r in records] == [
        (n, m) for n in (2, 4) for m in names
    ]
    assert sum(r.parameters for r in records) == 2 * LENGTH
    learned = [np.mean([walk(c, e).sum(0) for c in range(4)], axis=0) for e in (3, 4)]
    expected = np.abs(learned[0] + learned[1]) / (abs(learned[0]) + abs(learned[1]))
    sizes = [r.parameters for r in records[len(names) :]]
    means = [r.perturbation for r in records[len(names) :]]
    assert np.average(means, weights=sizes) == pytest.approx(expected.mean(), rel=1e-4)


def _run_with_layers(folder: Path, layers: int, shift: float) -> Path:
    run = make_run(folder)
    rows = [
        LayerRecord(n, f"l{i}", 5, 0.1 * n + shift, 0.5, 0.2, shift - n)
        for n in (1, 2, 3)
        for i in range(layers)
    ]
    append_layers(run, rows, new=True)
    return run


@pytest.mark.parametrize("layers", [1, 12, 40])
def test_figures_have_a_panel_a_group(layers: int, tmp_path: Path) -> None:
    """Means over the seeds; a group in which nothing was recorded has none."""
    folders = [_run_with_layers(tmp_path / str(i), layers, i / 10) for i in range(2)]
    group = [read_run(folder) for folder in folders]
    curves = layer_curves(group, "nonzero")
    assert len(curves) == layers
    assert curves["l0"][0] == [1, 2, 3]
    assert curves["l0"][1] == pytest.approx([0.15, 0.25, 0.35])
    without = [read_run(make_run(tmp_path / "without"))]
    # Not a mean: with each seed a parameter is another one.
    assert layer_curves([*without, *group], "value")["l0"][1] == [-1, -2, -3]
    groups = {"$some": group, "others": without, "first": group[:1], "last": group[1:]}
    for name in ("nonzero", "perturbation", "stabilised", "value"):
        file = tmp_path / f"{name}.png"
        assert draw_figure(name, groups, None, file)
        with Image.open(file) as image:
            image.verify()
        assert "layer over round" in caption(name, "accuracy") or name == "stabilised"
        assert not draw_figure(name, {"others": without}, None, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "other columns\n",
        ",".join(LayerRecord._fields) + "\n1,a,5,0.5\n",
        ",".join(LayerRecord._fields) + "\n1,a,5,0.5,nan,0,1\n",
        ",".join(LayerRecord._fields) + "\n1,a,5,0.5,0.5,17,1\n",
        ",".join(LayerRecord._fields) + "\nx,a,5,0.5,0.5,1,1\n",
        ",".join(LayerRecord._fields) + "\n1,a,5,0.5,0.5,1,inf\n",
        ",".join(LayerRecord._fields) + "\n1,a,5,0.5,0.5,1,1e308\n",
        ",".join(LayerRecord._fields) + "\n1,a,5,0.5,0.5,1,0.",
        ",".join(LayerRecord._fields) + f"\n{'9' * 401},a,5,0.5,0.5,1,1\n",
        ",".join(LayerRecord._fields) + "\n0,a,5,0.5,0.5,1,1\n",
        ",".join(LayerRecord._fields) + f"\n1,{'a' * 999},5,0.5,0.5,1,1\n",
        ",".join(LayerRecord._fields) + "\n1,a\x1b[2J,5,0.5,0.5,1,1\n",
    ],
)
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    """In one line, with the mend."""
    run = make_run(tmp_path / "run")
    (run / LAYERS_FILE).write_text(text)
    with pytest.raises(
        ReportError, match=r"layers.csv cannot be used .*; run it again"
    ):
        read_run(run)
