"""The tables, figures and page of a run: what they hold, and that drawing them again gives the same."""

import csv
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import matplotlib.image
import numpy as np
import optuna
import pandas as pd
import pytest
from synthetic import resnet, run_of

from mpsearch.allocation import Allocation
from mpsearch.budget import read_budgets
from mpsearch.costs.size import AverageBits, Bytes, Fraction
from mpsearch.errors import InputError
from mpsearch.evaluation import FINETUNED
from mpsearch.metrics.kl import KL
from mpsearch.optimize.pareto import hypervolume
from mpsearch.pipeline.confirm import confirm
from mpsearch.pipeline.evaluators import ConfirmEvaluator, SearchEvaluator
from mpsearch.pipeline.pick import pick
from mpsearch.pipeline.search import search
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.reporting.answer import answer
from mpsearch.reporting.charts.interactions import interactions
from mpsearch.reporting.charts.layers import MAX_ROWS, layer_bits
from mpsearch.reporting.charts.pareto import budget_positions
from mpsearch.reporting.findings import findings, run_hypervolume
from mpsearch.reporting.markdown import FIGURES as FIGURE_TITLES
from mpsearch.reporting.markdown import page
from mpsearch.reporting.report import write_report
from mpsearch.reporting.summary import summary, summary_rows
from mpsearch.reporting.tables import evaluations_table, front_table, sensitivity_table, trained_table
from mpsearch.runs.evaluation_rows import evaluation_row
from mpsearch.runs.run import SENSITIVITY_COLUMNS, Run, RunFolder
from mpsearch.runs.verified import Verified
from mpsearch.samplers.base import Problem, build_sampler
from mpsearch.tasks.overlap import overlap

COSTS = {"bytes": Bytes(), "bits": AverageBits(), "fraction": Fraction()}
FRONT_COLUMNS = [
    "size_bytes",
    "average_bits",
    "average_bits_all",
    "loss",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "measured_ms",
    "measured_ms_low",
    "measured_ms_high",
    "split",
    "allocation",
]
FIGURES = ("pareto.png", "layers.png", "layers_front.png", "sensitivity.png", "search.png")


def searched(engine, limits, n_trials=14):
    """A run up to its end: (result, what was confirmed)."""
    table = measure_sensitivity(engine, KL())
    budgets = read_budgets(limits, COSTS, engine.space)
    evaluate = SearchEvaluator(engine, budgets=budgets)
    search(evaluate, build_sampler(optuna.samplers.RandomSampler, Problem(table, (), budgets, 1)), n_trials=n_trials, n_seeds=6)
    limits = {budget.table.name: budget.limit for budget in budgets}
    identity = {
        "space": engine.space.to_dict(),
        "quality_name": "accuracy",
        "metric": {"name": "kl", "unit": "nats"},
        "budgets": limits,
        "model_name": "TinyNet",
        "task_name": "noise",
        "data": {"search": "30 samples", "confirm": "30 other samples"},
        "overlap": overlap(engine.task),
    }
    result = Run(engine.space, "accuracy", evaluate.log, table, limits, identity)
    confirmed = confirm(ConfirmEvaluator(engine, evaluate.log, budgets), result)
    return replace(result, evaluations=evaluate.log), confirmed


def save(result, folder):
    """The folder as the search leaves it before it reports."""
    run = RunFolder(folder)
    run.identify(result.identity)
    for i, group in enumerate(result.space.names):
        for j, scheme in enumerate(result.space.scheme_names):
            row = (group, scheme, "kl", float(result.sensitivity.values[i, j]), int(result.space.storage_bits[i, j]))
            run.append("sensitivity", dict(zip(SENSITIVITY_COLUMNS, row, strict=True)))
    for e in result.evaluations:
        run.append("evaluations", evaluation_row(e, result.space, "accuracy"))


@pytest.fixture(scope="module")
def reported(tiny, tmp_path_factory):
    """A run with budgets, reported: (result, folder)."""
    folder = tmp_path_factory.mktemp("run")
    engine = tiny.engine(tiny.net(), tiny.task())
    result, confirmed = searched(engine, {"bits": 7.5, "bytes": 420, "fraction": 0.45})
    save(result, folder)
    page = write_report(result, folder, pick(result), confirmed)
    assert page == folder / "report.md"
    return result, folder


def test_interactions_are_drawn_where_the_metric_knows_them(reported, tmp_path, monkeypatch):
    result, folder = reported
    assert not (folder / "interactions.png").exists()
    assert "interactions.png" not in (folder / "report.md").read_text()
    effects = np.zeros((2, 3, 3), dtype=np.float32)
    effects[:, 0], effects[:, 1], effects[:, 2] = [[1] * 3, [0] * 3], [[-3] * 3, [0] * 3], [[1] * 3, [1] * 3]
    values = 0.5 * np.square(effects).sum(0)
    knowing = replace(result, sensitivity=replace(result.sensitivity, effects=effects, values=values))
    drawn = interactions(knowing.sensitivity, pick(result))
    assert drawn.loc["first", "second"] == pytest.approx(-1)
    assert drawn.loc["last", "first"] == pytest.approx(0.5**0.5)
    for other in ("pareto", "layers", "sensitivity", "search"):
        monkeypatch.setattr(f"mpsearch.reporting.report.draw_{other}", lambda *args, **kwargs: [])
    write_report(knowing, tmp_path, pick(result))
    assert "![Interactions](interactions.png)" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "interactions.png").stat().st_size > 5_000
    unrelated = replace(knowing.sensitivity, effects=1e-3 * effects)
    assert interactions(unrelated, pick(result)) is None
    write_report(replace(knowing, sensitivity=unrelated), tmp_path, pick(result))
    assert not (tmp_path / "interactions.png").exists()
    assert "interactions.png" not in (tmp_path / "report.md").read_text()


def test_front_table_has_its_columns_and_two_rows_a_point(reported):
    result, folder = reported
    with open(folder / "front.csv", newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == FRONT_COLUMNS
    assert [bool(row[7]) for row in rows] == [False, True] * len(result.front), "what is packed is timed"
    assert [row[10] for row in rows] == ["search", "confirm"] * len(result.front)
    assert len(result.front) > 2
    confirmed = result.on("confirm")
    for e, of_search, of_confirm in zip(result.front, rows[::2], rows[1::2], strict=True):
        for measured, row in ((e, of_search), (confirmed[e.allocation], of_confirm)):
            scores = (measured.loss, measured.quality, measured.quality_low, measured.quality_high)
            sizes = [e.size_bytes, e.average_bits, 32 * e.fraction]
            assert [float(cell) for cell in row[:7]] == [*sizes, *scores], "floats to the last bit"
            assert Allocation(json.loads(row[11])) == e.allocation
    assert [int(row[0]) for row in rows] == sorted(int(row[0]) for row in rows)


def test_uniform_table_has_the_same_columns(reported):
    _, folder = reported
    table = pd.read_csv(folder / "uniform.csv")
    assert list(table.columns) == FRONT_COLUMNS
    assert table.split.tolist() == ["search", "confirm"] * 3
    assert [set(json.loads(text).values()) for text in table.allocation[::2]] == [{"w2"}, {"w4"}, {"w8"}]


def test_confirm_table(reported):
    result, folder = reported
    table = pd.read_csv(folder / "confirm.csv")
    assert len(table) == len(result.front) + 3
    assert table.scheme.fillna("").tolist() == [""] * len(result.front) + ["w2", "w4", "w8"]
    assert (table.drop_low <= table["drop"]).all()
    assert (table["drop"] <= table.drop_high).all()


@pytest.mark.parametrize("name", FIGURES)
def test_figures_show_something(reported, name):
    image = matplotlib.image.imread(reported[1] / name)
    assert min(image.shape[:2]) > 150
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50


def test_the_vector_figure_says_what_is_what(reported):
    text = (reported[1] / "pareto.svg").read_text()
    assert ET.fromstring(text).tag.endswith("svg")
    for words in ("front, search split", "front, confirm split", "float model, confirm", "budget.bits = 7.5", "picked"):
        assert words in text


def test_the_page_says_what_was_found(reported):
    result, folder = reported
    page = (folder / "report.md").read_text()
    assert page.startswith("# TinyNet on noise\n")
    assert re.findall(r"!\[[^]]+\]\((\S+)\)", page) == list(FIGURES)
    for words in (
        "Confirm data: 30 other samples.",
        "The splits are disjoint: no input",
        f"{len(result.front)} of them make the front",
    ):
        assert words in page
    picked = pick(result)
    everything = 8 * picked.size_bytes / (8 * result.baseline().size_bytes / 32)
    said = f"The picked point has {picked.average_bits:.2f} bits per weight on average ({everything:.2f} over all parameters)"
    assert said in page
    assert "the models ran on packed weights" in page
    rows = [f"| {e.average_bits:.3f} | {32 * e.fraction:.3f} | {e.size_bytes:,} | {e.loss:.4g} |" in page for e in result.front]
    assert sum(rows) == min(len(result.front), 12)
    assert rows[0]
    assert rows[-1]
    assert rows[result.front.index(picked)]
    assert page.count("| picked") >= 1


def test_no_temporary_files_are_left(reported):
    names = {path.name for path in reported[1].iterdir()}
    tables = {"front.csv", "uniform.csv", "confirm.csv", "evaluations.csv", "sensitivity.csv"}
    assert names == {*FIGURES, "pareto.svg", "index.html", "report.md", "space.json", *tables}


def test_drawn_again_from_its_folder_it_is_the_same(reported):
    _, folder = reported
    texts = {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".csv", ".md", ".json")}
    images = {name: matplotlib.image.imread(folder / name) for name in FIGURES}
    for name in ("front.csv", "uniform.csv", "report.md", *FIGURES):
        (folder / name).unlink()
    again = Run.load(folder)
    write_report(again, folder, pick(again))
    assert {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".csv", ".md", ".json")} == texts
    for name, image in images.items():
        assert np.array_equal(matplotlib.image.imread(folder / name), image)


def test_without_confirmation_it_says_so(tiny, tmp_path):
    engine = tiny.engine(tiny.net(), tiny.task())
    result, _ = searched(engine, {})
    rows = [e for e in result.evaluations if e.split == "search"]
    alone = Run(result.space, "accuracy", rows, result.sensitivity, {}, result.identity)
    page = write_report(alone, tmp_path, pick(alone)).read_text()
    assert "not measured" in page
    assert not (tmp_path / "confirm.csv").exists()
    assert set(pd.read_csv(tmp_path / "front.csv").split) == {"search"}


def test_a_front_without_any_uniform_rival(tiny, tmp_path):
    """One confirmed point and nothing else: the table of drops has no name of a scheme at all."""
    engine = tiny.engine(tiny.net(), tiny.task())
    table = measure_sensitivity(engine, KL())
    evaluate = SearchEvaluator(engine)
    evaluate(Allocation(), "float")
    evaluate(Allocation({"first": "w4", "second": "w2", "last": "w8"}), "knapsack", trial=0)
    result = Run(engine.space, "accuracy", evaluate.log, table)
    confirmed = confirm(ConfirmEvaluator(engine, evaluate.log), result)
    result = replace(result, evaluations=evaluate.log)
    page = write_report(result, tmp_path, pick(result), confirmed)
    assert "1 of them make the front" in page.read_text()
    assert run_hypervolume(result) is None
    assert "Hypervolume" not in page.read_text()


def test_a_long_front_is_thinned_but_keeps_the_pick(tiny):
    engine = tiny.engine(tiny.net(), tiny.task())
    result, _ = searched(engine, {}, n_trials=27)
    assert MAX_ROWS == 24
    picked = result.front[1]
    bits, schemes, position = layer_bits(result, picked, max_rows=2)
    assert position == 1
    assert schemes.iloc[1].to_dict() == dict(picked.allocation)
    assert len(bits) == 3
    first = result.space.schemes[result.front[0].allocation["first"]]
    assert bits.iloc[0]["first"] == first.storage_bits((4, 2, 3, 3)) / 72


def test_hypervolume_is_that_of_the_front_below_the_uniform_corner(reported):
    result, _ = reported
    ends = dict(result.uniform)
    expected = hypervolume(
        [e.average_bits for e in result.front], [e.loss for e in result.front], ends["w8"].average_bits, ends["w2"].loss
    )
    assert run_hypervolume(result) == expected > 0


def test_summary_has_float_uniform_and_pick(reported):
    result, _ = reported
    rows = summary_rows(result, pick(result))
    assert [row[0] for row in rows] == ["float", "uniform w2", "uniform w4", "uniform w8", "picked"]
    assert rows[0][1:3] == ("32.00", "32.00")
    assert rows[0][7] == ""
    assert all(float(row[2]) > float(row[1]) for row in rows[1:]), "biases stay float"
    assert all(" to " in row[7] for row in rows[1:])


def test_a_damaged_confirm_table_is_named(reported, undrawn, tmp_path):
    result, _ = reported
    for text in ("", "\x00\x00", "scheme,drop\n,0.1\n"):
        (tmp_path / "confirm.csv").write_text(text)
        with pytest.raises(InputError, match=r"confirm.csv is damaged: .*\. Delete it and confirm again"):
            write_report(result, tmp_path, pick(result))


def test_what_is_drawn_is_computed_by_hand(reported):
    """The positions of the budgets in bytes, and the losses and qualities of a trained point before and after."""
    result, _ = reported
    picked = pick(result)
    rows = {split: result.on(split)[picked.allocation] for split in ("search", "confirm")}
    after = {
        split: replace(e, trial=None, origin=FINETUNED, loss=e.loss / 3, quality=e.quality + 0.25) for split, e in rows.items()
    }
    result = replace(result, evaluations=[*result.evaluations, *after.values()])
    limits = budget_positions(result, "size_bytes")
    n_weights = sum(layer.numel for layer in result.space.layers)
    rest = result.space.other_bits / 8
    assert limits == {
        "budget.bits = 7.5": pytest.approx(7.5 * n_weights / 8 + rest),
        "budget.bytes = 420": 420,
        "budget.fraction = 0.45": pytest.approx(0.45 * (4 * n_weights + rest)),
    }
    drawn = trained_table(result)
    for row in drawn.to_dict("records"):
        was, became = rows[row["split"]], after[row["split"]]
        assert (row["loss_before"], row["loss"]) == (was.loss, became.loss)
        assert (row["accuracy_before"], row["accuracy"]) == (was.quality, became.quality)
    assert len(drawn) == 2


def test_the_counts_of_the_page_are_those_of_the_tables(reported):
    """Trials, allocations, points of the front and what its samples cannot show, counted from `evaluations.csv` by hand."""
    _, folder = reported
    page = (folder / "report.md").read_text()
    rows = pd.read_csv(folder / "evaluations.csv").to_dict("records")
    tried = {e["allocation"]: e for e in rows if e["split"] == "search" and e["origin"] != "float"}
    accepted = {e["allocation"] for e in rows if e["split"] == "search" and e["accepted"]}
    within = [e for e in tried.values() if e["feasible"] and e["allocation"] in accepted]
    front = [
        e
        for e in within
        if not any(
            o["size_bytes"] <= e["size_bytes"]
            and o["loss"] <= e["loss"]
            and (o["size_bytes"], o["loss"]) != (e["size_bytes"], e["loss"])
            for o in within
        )
    ]
    n_trials = sum(e["trial"] == e["trial"] for e in rows)
    assert f"{n_trials} trials measured {len(tried)} different ones; {len(front)} of them make the front." in page
    (n,) = {e["n_samples"] for e in rows if e["split"] == "confirm"}
    least = 100 * 1.959964**2 / (n + 1.959964**2)  # the score interval's end where no sample differs
    assert f"{n} samples cannot show a drop below {least:.2g} points" in page


def test_dominated_points_are_counted_on_the_front_alone(reported):
    result, _ = reported
    table = pd.DataFrame(
        {
            "scheme": ["", "", "", "", "w2"],
            "dominated_by_bytes": [np.nan, 300, 310, 320, 330],
            "significantly_dominated": [False, True, False, True, True],
        }
    )
    said = " ".join(findings(result, pick(result), table))
    assert "On the confirm split 3 of 4 points of the front are dominated in loss" in said
    assert "for 2 of them that point's accuracy is significantly better" in said


def test_the_summary_says_what_to_do_next_in_less_than_a_screen(reported):
    result, folder = reported
    picked = pick(result)
    shown = summary(result, picked, folder)
    assert {len(row) for row in shown.rows} == {len(shown.header)}
    assert f"{picked.size_bytes:,} bytes, " in shown.lines[0]
    assert shown.steps[0].startswith("export a point: mpsearch export ")
    assert shown.steps[0].endswith(f"pick.point={picked.allocation.id}")
    assert len(shown.rows) + 6 + len(shown.lines) + len(shown.steps) <= 22, "with a title, a frame, and three paths: 25"
    assert not summary(result, picked).steps


def test_the_tables_are_tidy(reported):
    result, folder = reported
    assert front_table(result).to_csv(index=False) == (folder / "front.csv").read_text()
    table = sensitivity_table(result.sensitivity)
    assert list(table.columns) == list(SENSITIVITY_COLUMNS)
    first = table[(table.group == "first") & (table.scheme == "w4")].iloc[0]
    assert first.value == result.sensitivity.values[0, result.space.scheme_names.index("w4")]
    assert len(evaluations_table(result)) == len(result.evaluations)


def test_the_report_is_at_most_80_lines(tmp_path, undrawn):
    """With many schemes, trained points and verified files."""
    names = ("w1", "w2", "w3", "w4", "w4g64", "w5", "w6", "w7", "w8", "fp8_e4m3", "bf16")
    run = run_of(resnet(), n=300, schemes=names, budgets={"bits": 9.0}, timed=True, confirmed=40, floats=(0.999, 0.9))
    trained = [
        replace(e, trial=None, origin=FINETUNED, loss=e.loss / 2) for s in ("search", "confirm") for e in run.on(s).values()
    ]
    run = replace(run, evaluations=[*run.evaluations, *trained])
    scores = {"loss": 0.01, "packed_loss": 0.01, "quality": 0.9, "quality_low": 0.89, "quality_high": 0.91, "n_samples": 400}
    times = {"ms": 1.25, "ms_low": 1.2, "ms_high": 1.3, "float_ms": 2.5, "packed_ms": 2.0, "measured_on": "Z80, 1 threads"}
    points = [e.allocation.id for e in run.front[:8]]
    verified = [Verified("onnx", "onnxruntime", point, False, 45_678, **scores, **times) for point in points]
    confirmed = None
    text = page(run, pick(run), confirmed, list(FIGURE_TITLES), verified)
    assert "## After training" in text
    assert len(text.splitlines()) <= 80
    assert answer(run, pick(run)) in text


def test_the_answer_names_its_split_and_says_unseen_only_where_that_was_checked():
    shared = {"search in the calibration": 3, "confirm in the calibration": 0, "confirm in the search": 0}
    for compared, said in ((None, "400 samples of"), ({"samples": {}, "shared": shared}, "400 unseen samples of")):
        run = run_of(resnet()[:6], identity={"overlap": compared})
        assert f"{said} the confirm split)." in answer(run, pick(run))
    run = run_of(resnet()[:6], confirmed=0)
    assert "400 samples of the search split, on which it was selected)." in answer(run, pick(run))
