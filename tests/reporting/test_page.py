"""The page in a browser: points can be clicked, commands are right, no text overlaps another or is hard to read."""

import json
import re
from importlib import resources
from pathlib import Path

import pytest
from browser import Browser
from synthetic import resnet, run_of, transformer

from mpsearch import progress
from mpsearch.pipeline.pick import pick
from mpsearch.progress import Phase
from mpsearch.reporting.answer import millijoules
from mpsearch.reporting.page.content import content
from mpsearch.reporting.page.document import SCRIPTS, as_json, document
from mpsearch.reporting.report import write_page
from mpsearch.runs.run import RunFolder
from mpsearch.runs.verified import Verified, append_verified

HOSTILE = "net</script><script>throw 1</script><img src=x onerror=throw&1> \u2028 {{content}} ${1}"

CHECKS = Path(__file__).with_name("page_checks.js").read_text()

RUNS = {
    "small": lambda: run_of(resnet()[:10], budgets={"bits": 4.0}, effects=True, timed=True),
    "resnet": lambda: run_of(resnet(), n=300, floats=(0.999, 0.91), identity={"overlap": None}),
    "perplexity": lambda: run_of(transformer(6), quality="perplexity", kind="perplexity", floats=(4.2, 4.3), n_samples=12),
    "two_costs": lambda: run_of(resnet(), objectives=("size_bytes", "latency_ms"), confirmed=0),
    "large": lambda: run_of(transformer(143), n=10_000, schemes=("w2", "w3", "w4", "w4g64", "w5", "w6", "w8"), effects=True),
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """name -> (run, path of its page), made when asked for."""
    made = {}

    def page(name):
        if name not in made:
            run, folder = RUNS[name](), tmp_path_factory.mktemp(name)
            made[name] = run, write_page(run, folder, pick(run))
        return made[name]

    return page


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name == "large" else ()) for name in RUNS])
def test_texts_are_readable_at_three_widths(browser, pages, name, dark):
    _, page = pages(name)
    for width in (1280, 820, 400):
        browser.open(page, width, dark=dark)
        found = browser.js(f"{CHECKS}.overlaps()")
        assert found["n"] > 100
        assert found["found"] == [], f"at {width}"
        assert found["wide"] <= 0, f"the page scrolls sideways at {width}"
        contrasts = browser.js(f"{CHECKS}.contrasts()")
        assert contrasts["n"] > 100
        assert contrasts["low"] == []
        assert browser.errors == []


def test_a_clicked_point_shows_its_layers_and_commands(browser, pages):
    run, page = pages("small")
    browser.open(page)
    points = {e.allocation.id: e for e in run.on("search").values()}
    count = browser.js("document.querySelectorAll('#c-loss .mark').length")
    assert count >= len(run.front)
    for position in (0, count // 2, count - 1):
        at = browser.js(f"""(() => {{ const mark = document.querySelectorAll('#c-loss .mark')[{position}];
            mark.scrollIntoView({{block: 'center'}}); const b = mark.getBoundingClientRect();
            return [b.x + b.width / 2, b.y + b.height / 2]; }})()""")
        browser.mouse(*at)
        assert "bits per weight" in browser.js("document.getElementById('tip').textContent")
        top = browser.js(f"Number(document.elementFromPoint({at[0]}, {at[1]}).dataset.point)")
        browser.mouse(*at, click=True)
        chosen = browser.js("document.querySelector('#facts dd').textContent")
        assert browser.js(f"data.points[{top}].id") == chosen
        e = points[chosen]
        facts = browser.js("document.getElementById('facts').textContent")
        assert f"{e.size_bytes:,} bytes" in facts
        commands = browser.js("[...document.querySelectorAll('.command code')].map(c => c.textContent)")
        assert commands[0] == f"mpsearch export run={page.parent} pick.point={chosen}"
        assert commands[1] == f"mpsearch verify run={page.parent} pick.point={chosen}"
        assert commands[2] == f"mpsearch finetune run={page.parent} pick.point={chosen}"
        assert pick(run, point=chosen) == e
        browser.js("document.querySelector('#point details').open = true")
        browser.js("new Promise(done => setTimeout(done, 60))")
        schemes = browser.js(
            "[...document.querySelectorAll('#t-layers tbody tr')].map(r => [r.cells[0].textContent, r.cells[3].textContent])"
        )
        assert dict(schemes) == dict(e.allocation)
        size = browser.js("document.querySelector('#c-size svg').getAttribute('aria-label')")
        parts = [int(n) for n in re.findall(r": (\d+) bytes", size)]
        assert sum(parts) == pytest.approx(e.size_bytes, abs=len(parts))
        assert browser.js("location.hash") == f"#point={chosen}"
    assert browser.errors == []


def test_the_front_is_used_with_the_keyboard(browser, pages):
    _, page = pages("small")
    browser.open(page)
    browser.js("document.querySelector('#c-loss .mark[tabindex=\"0\"]').focus()")
    before = browser.js("document.activeElement.dataset.point")
    browser.key("ArrowRight", 39)
    after = browser.js("document.activeElement.dataset.point")
    assert before != after
    assert "bits per weight" in browser.js("document.activeElement.getAttribute('aria-label')")
    browser.key("Enter", 13)
    assert browser.js("document.querySelector('#facts dd').textContent") == browser.js(f"data.points[{after}].id")
    named = "n => n.textContent || n.ariaLabel || n.labels?.length"
    assert browser.js(f"[...document.querySelectorAll('button, input, select, [role=button]')].every({named})")


def test_it_is_printed_on_white_paper_without_controls(browser, pages):
    _, page = pages("small")
    browser.open(page, 760, dark=True)
    dark = browser.js("getComputedStyle(document.body).backgroundColor")
    media = {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.call("Emulation.setEmulatedMedia", **media)
    assert dark != browser.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.js("[...document.querySelectorAll('button, #controls')].every(node => !node.checkVisibility())")
    assert browser.js(f"{CHECKS}.contrasts()")["low"] == []


def test_splits_are_toggled(browser, pages):
    _, page = pages("small")
    browser.open(page)
    count = "document.querySelectorAll('#c-loss .mark[data-split=\"{}\"]').length"
    before = {split: browser.js(count.format(split)) for split in ("search", "confirm")}
    assert min(before.values()) > 0
    browser.js("document.querySelectorAll('#controls input')[1].click()")
    assert browser.js(count.format("confirm")) == 0
    assert browser.js(count.format("search")) == before["search"]
    assert browser.errors == []


def test_hostile_names_are_text(browser, tmp_path):
    names = [HOSTILE + str(i) for i in range(4)]
    run = run_of(
        names, identity={"model_name": HOSTILE, "task_name": HOSTILE, "data": {"search": HOSTILE, HOSTILE: "1"}}, effects=True
    )
    (tmp_path / progress.FILE).write_text(json.dumps([vars(Phase(HOSTILE, 1, 1, 0.5, note=HOSTILE, finished=True))]))
    page = write_page(run, tmp_path, pick(run))
    browser.open(page)
    assert browser.errors == []
    assert browser.js("document.querySelectorAll('img').length") == 0
    assert browser.js("document.scripts.length") == 2
    assert browser.js("document.querySelector('h1').textContent").startswith("net</script><script>")
    assert browser.js("document.querySelector('#c-time svg').ariaLabel").startswith(HOSTILE)


def test_a_thousand_layers_and_ten_thousand_evaluations_stay_fluid(browser, pages):
    run, page = pages("large")
    assert len(run.space.names) > 1000
    assert page.stat().st_size < 1_500_000
    seconds = browser.open(page)
    assert seconds < 10, "on a busy machine; about one on a quiet one"
    draw = "choose(Math.floor(points.length / 2), false)"
    drawing = browser.js(f"(() => {{ const start = performance.now(); {draw}; return performance.now() - start; }})()")
    assert drawing < 2000
    assert browser.js("document.querySelectorAll('#map .cell').length") == len(run.space.names)
    assert browser.js("document.querySelectorAll('*').length") < 12_000


def test_the_page_needs_no_other_file(pages):
    _, page = pages("small")
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=[\"'](?!#)", text)
    assert 'http-equiv="refresh"' not in text
    for name in (*SCRIPTS, "page.css", "template.html"):
        assert resources.files("mpsearch.reporting.page").joinpath(name).is_file()
    assert "url(" not in text


def test_the_data_survive_the_escape():
    about = {"a": [HOSTILE, 1.5, None], "b": {"<&>": "\u2029"}}
    text = as_json(about)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == about
    with pytest.raises(ValueError, match="JSON"):
        as_json({"a": float("nan")})


def test_a_run_in_progress_says_so_and_is_loaded_again(tmp_path):
    run = run_of(resnet(), confirmed=0)
    phases = [Phase("calibrate", 3, 3, 1.5, finished=True), Phase("search", 100, 40, 20.0, left=30.0)]
    about = content(run, pick(run), tmp_path, None, phases=phases)
    assert about["running"]
    assert 'http-equiv="refresh"' in document(about)
    assert any("Nothing is confirmed yet" in text for text in about["warnings"])


def test_what_runtimes_measured_is_shown_with_its_source(browser, tmp_path):
    run = run_of(resnet(), timed=True)
    point = pick(run).allocation.id
    scores = {"loss": 0.01, "packed_loss": 0.01, "quality": 0.9, "quality_low": 0.89, "quality_high": 0.91, "n_samples": 400}
    times = {"ms": 1.25, "ms_low": 1.2, "ms_high": 1.3, "float_ms": 2.5, "packed_ms": 2.0, "measured_on": "Z80, 1 threads"}
    verified = Verified("onnx", "onnxruntime", point, False, 45_678, **scores, **times)
    append_verified(RunFolder(tmp_path), verified, "accuracy")
    browser.open(write_page(run, tmp_path, pick(run)))
    saved = browser.js("[...document.querySelectorAll('#t-saves tbody tr')].map(r => [...r.cells].map(c => c.textContent))")
    (time,) = [row for row in saved if row[0] == "forward pass in onnxruntime"]
    assert time[1:] == ["2.5 ms in PyTorch", "1.25 ms", "measured on Z80, 1 threads; mpsearch verify exporter=onnx"]
    assert all(row[3] for row in saved), "no claim without its source"
    energy = next(row for row in saved if row[0].startswith("energy"))
    assert "Horowitz" in energy[3]
    assert "90.00" in browser.js("document.getElementById('t-verified').textContent")
    assert browser.errors == []


def test_energy_is_counted_by_hand(tmp_path):
    run = run_of(["a", "b"], schemes=("w2", "w4"))
    macs, weights, other = 2 * 64 * 64 * 8, 2 * 64 * 64, run.space.other_bits
    per_bit = 1300 / 64
    assert millijoules(run, None) == pytest.approx((macs * 4.6 + (32 * weights + other) * per_bit) / 1e9)
    assert millijoules(run, run.front[0]) == pytest.approx((macs * 4.6 + 8 * run.front[0].size_bytes * per_bit) / 1e9, rel=1e-6)


def test_allocations_are_those_of_the_points(tmp_path):
    run = run_of(resnet())
    about = content(run, pick(run), tmp_path, None)
    front = {e.allocation.id: e for e in (*run.front, *(e for _, e in run.uniform))}
    for point, code in zip(about["points"], about["allocations"], strict=True):
        e = front[point["id"]]
        assert run.space.decode(code) == e.allocation
        assert point["bytes"] == e.size_bytes
        total = sum(about["storage"][i][j] for i, j in enumerate(run.space.choice(e.allocation))) + run.space.other_bits
        assert (total + 7) // 8 == e.size_bytes
        parts = sum(table[i][j] for table in about["parts"].values() for i, j in enumerate(run.space.choice(e.allocation)))
        assert 8 * parts + run.space.other_bits == total
