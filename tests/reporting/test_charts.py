"""Each figure of four runs: no text overlaps another, every label and line is inside its axes, and panels are files."""

from dataclasses import replace

import numpy as np
import pytest
from synthetic import resnet, run_of, transformer

from mpsearch.pipeline.pick import pick
from mpsearch.reporting.charts import interactions, layers, pareto, search, sensitivity
from mpsearch.reporting.charts.network import ink_on
from mpsearch.reporting.charts.style import BITS, FORMATS, Label, lay_out, new_figure, place_labels, styled
from mpsearch.reporting.report import write_report

RUNS = {
    "digits_like": lambda: run_of(resnet()[:10], budgets={"bits": 4.0, "bytes": 30_000}, effects=True, timed=True),
    "overfit": lambda: run_of(resnet(), n=300, floats=(0.999, 0.91)),
    "two_costs": lambda: run_of(resnet(), objectives=("size_bytes", "latency_ms"), quality="perplexity", kind="perplexity"),
    "nameless": lambda: run_of(["stem", "depthwise", "pointwise", "linear"], timed=True),
    "large": lambda: run_of(transformer(143), n=60, effects=True, schemes=("w2", "w3", "w4", "w4g64", "w6", "w8")),
}


def drawn(run, monkeypatch):
    """Name -> figure, of all that a report draws."""
    figures = {}
    for module in (pareto, layers, sensitivity, interactions, search):
        monkeypatch.setattr(module, "save", lambda figure, folder, name, formats=(): figures.setdefault(name, figure))
    picked = pick(run)
    pareto.draw_pareto(run, picked, None, every=True)
    layers.draw_layers(run, picked, None)
    sensitivity.draw_sensitivity(run.sensitivity, None)
    interactions.draw_interactions(run.sensitivity, picked, None)
    search.draw_search(run, None, every=True)
    return figures


def text_boxes(figure):
    """(text, its box in pixels) of all texts that are drawn."""
    renderer = figure.canvas.get_renderer()
    texts = [t for axes in figure.axes for t in (*axes.texts, axes.title, axes._left_title, axes._right_title)]
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
            texts += [axis.label, *(label for tick in axis._update_ticks() for label in (tick.label1, tick.label2))]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_visible() and t.get_text().strip()]
    return [(text, box.extents) for text, box in boxes if box.width > 0]


def overlapping(boxes):
    """Pairs of texts whose boxes share more than a pixel."""
    names, extents = [text for text, _ in boxes], np.array([box for _, box in boxes])
    low, high = extents[:, None, :2], extents[:, None, 2:]
    shared = (np.minimum(high, extents[None, :, 2:]) - np.maximum(low, extents[None, :, :2])).min(2)
    return [(names[i], names[j]) for i, j in np.argwhere(shared > 1) if i < j]


@pytest.mark.thin(len(RUNS))
@pytest.mark.parametrize("name", RUNS)
def test_no_texts_overlap_and_lines_are_inside_their_axes(name, monkeypatch):
    figures = drawn(RUNS[name](), monkeypatch)
    assert {
        "pareto",
        "layers",
        "sensitivity",
        "search",
        "pareto_loss" if name != "two_costs" else "pareto_loss_latency_ms",
    } <= set(figures)
    assert ("interactions" in figures) == (name in ("digits_like", "large"))
    assert ("layers_front" in figures) == (name != "large")
    for title, figure in figures.items():
        with styled():
            lay_out(figure)
            figure.draw_without_rendering()
            boxes = text_boxes(figure)
            assert len(boxes) > 5
            assert overlapping(boxes) == [], title
            for axes in figure.axes:
                frame = axes.get_window_extent()
                for label in axes.texts if title.startswith("pareto") else ():
                    box = label.get_window_extent()
                    assert (np.array(box.p0) >= frame.p0).all(), (title, label)
                    assert (np.array(box.p1) <= frame.p1).all(), (title, label)
                for line in axes.lines:
                    if line.get_marker() != ".":  # what was tried is cut off
                        at = line.get_transform().transform(line.get_xydata())
                        assert (at >= np.array(frame.p0) - 2).all(), (title, line)
                        assert (at <= np.array(frame.p1) + 2).all(), (title, line)


def test_far_splits_have_axes_of_their_own(monkeypatch):
    run = RUNS["overfit"]()
    names = list(pareto.panels(run, pick(run)))
    assert names == ["pareto_loss", "pareto_quality_confirm", "pareto_quality_search"]
    near = run_of(resnet(), n=60)
    assert list(pareto.panels(near, pick(near))) == ["pareto_loss", "pareto_quality"], "without times no panel of them"


def test_a_low_map_has_its_colours_below_and_a_single_section_no_name(monkeypatch):
    for names, has_name in ((["stem", "depthwise", "pointwise", "linear"], False), (resnet(), True)):
        figure = drawn(run_of(names), monkeypatch)["layers"]
        lay_out(figure)
        cells, bar = (axes.get_window_extent() for axes in figure.axes)
        assert bar.y1 <= cells.y0
        assert bar.height < bar.width
        assert ("other layers" in [text for text, _ in text_boxes(figure)]) is has_name


def test_of_many_uniform_allocations_those_of_their_front_and_the_ends_are_labelled(monkeypatch):
    schemes = ("w2", "w3", "w4", "w6", "w8", "w2g64", "w3g64", "w4g64", "w8g64")
    run = run_of(resnet(), schemes=schemes)
    worse = {run.space.uniform(name) for name in schemes if "g64" in name}
    run = replace(run, evaluations=[replace(e, loss=20 * e.loss) if e.allocation in worse else e for e in run.evaluations])
    texts = {text for text, _ in text_boxes(drawn(run, monkeypatch)["pareto_loss"])}
    assert texts & set(schemes) <= {"w2", "w3", "w4", "w6", "w8", "w8g64"}, "w8g64 is the largest"
    assert len(texts & set(schemes)) >= 3


def test_fonts_are_legible_at_half_size(monkeypatch):
    figures = drawn(RUNS["digits_like"](), monkeypatch)
    for figure in figures.values():
        sizes = [
            t.get_fontsize() for axes in figure.axes for t in (*axes.texts, *axes.get_xticklabels(), axes.title, axes.xaxis.label)
        ]
        assert min(sizes) >= 10, "5 points at half size"
    assert figures["pareto_loss"].get_size_inches()[0] <= 2 * 3.4, "twice a column"


@pytest.mark.slow
def test_panels_are_files_in_three_formats_and_stale_ones_are_removed(tmp_path):
    run = run_of(resnet()[:6], n=40, timed=True)
    write_report(run, tmp_path, pick(run), every_figure=True)
    names = {path.name for path in tmp_path.iterdir()}
    panels = ["pareto", "pareto_loss", "pareto_quality", "pareto_time", "layers", "layers_front", "sensitivity"]
    for panel in [*panels, "search", "search_predicted", "search_hypervolume"]:
        assert {f"{panel}.{suffix}" for suffix in FORMATS} <= names
    first = {suffix: (tmp_path / f"pareto_loss.{suffix}").read_bytes() for suffix in FORMATS}
    write_report(run, tmp_path, pick(run), every_figure=True)
    assert first == {suffix: (tmp_path / f"pareto_loss.{suffix}").read_bytes() for suffix in FORMATS}, "no dates, no random names"
    write_report(run_of(resnet()[:6], n=40), tmp_path, pick(run))
    assert not (tmp_path / "pareto_time.png").exists()
    assert not (tmp_path / "pareto_loss.pdf").exists()
    assert (tmp_path / "pareto.png").exists()


def test_labels_find_free_places_or_are_left_out():
    with styled():
        figure, ((axes,),) = new_figure(4, 3)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        lay_out(figure)
        place_labels(axes, [Label(f"label {i}", [(0.5, 0.5)], "black") for i in range(60)])
        boxes = [(t.get_text(), t.get_window_extent().extents) for t in axes.texts]
    assert 5 < len(boxes) < 60
    assert overlapping(boxes) == []


def test_ink_has_contrast_on_every_colour():
    def light(color):
        linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in color]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    rng = np.random.default_rng(0)
    for color in rng.uniform(size=(500, 3)):
        ink = (0.0,) * 3 if ink_on(tuple(color)) == "black" else (1.0,) * 3
        high, low = sorted((light(color), light(ink)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5
    assert sorted(BITS) == list(BITS)
