"""Training from what was searched: what is scored is what is stored, a kill changes nothing, and the search is left alone."""

import itertools
import re
import sys

import pytest
import torch
from safetensors import safe_open

from mpsearch import kernels
from mpsearch.allocation import Allocation
from mpsearch.cli import main
from mpsearch.errors import InputError
from mpsearch.exporters.allocation_file import load_allocation
from mpsearch.models.digits import digits
from mpsearch.packed.model import packed
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.pipeline.pick import pick
from mpsearch.runs.run import Run
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.floating import Float
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.rotated import Rotated
from mpsearch.tasks.digits import Digits
from mpsearch.training import finetune as module
from mpsearch.training.fake_quantize import rotate_back
from mpsearch.training.finetune import Training, checkpoint_name, finetune
from mpsearch.training.student import Student


def mixed(engine):
    """Every scheme once, in turn."""
    names = itertools.cycle(engine.space.scheme_names)
    return Allocation((group.name, next(names)) for group in engine.space.groups)


def stored(engine, allocation):
    layers = [(la.name, allocation[g.name]) for g in engine.space.groups for la in g.layers]
    tensors = {f"{la}.{k}": t for la, s in layers for k, t in engine.quantized(la, s).tensors.items()}
    return tensors | {f"{m}.bias": b for la, s in layers for m, b in engine.biases(la, s).items()}


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_training_lowers_the_loss_and_leaves_the_model_and_its_bank_alone(trained, tiny, tmp_path):
    allocation = trained.space.uniform("w2")
    before, bank = tiny.state(trained.model), stored(trained, allocation)
    post_training = trained.score(allocation)
    found = finetune(trained, allocation, Training(epochs=6, batch_size=50, learning_rate=0.01), tmp_path)
    assert found.losses[0] == post_training.loss
    assert len(found.losses) == 7
    assert min(found.losses) < 0.7 * found.losses[0]
    score = found.engine.score(allocation)
    assert score.loss == min(found.losses) == found.losses[found.epoch]
    tiny.assert_same_state(trained.model, before)
    assert_same_tensors(stored(trained, allocation), bank)
    assert trained.score(allocation) == post_training
    evaluate = SearchEvaluator(found.engine)
    measured = evaluate(allocation, "finetuned")
    space = trained.space
    assert sum(found.engine.quantized(la.name, "w2").nbytes for g in space.groups for la in g.layers) * 8 + space.other_bits == (
        space.size_bits(space.choice(allocation))
    )
    assert (measured.loss, measured.size_bytes) == (score.loss, (space.size_bits(space.choice(allocation)) + 7) // 8)
    with packed(found.engine, allocation) as model:
        assert found.engine.score_of(model, "search").loss == pytest.approx(score.loss, rel=1e-4)


@pytest.mark.parametrize(
    "scheme",
    [
        Codebook("ternary"),
        Codebook("nf4", 64, "e8m0"),
        Integer(4, input=IntegerInput(3, "static", symmetric=False, range="minmax")),
    ],
    ids=["ternary", "nf4", "static input"],
)
def test_tables_and_static_inputs_learn_too(tiny, tmp_path, scheme):
    engine = tiny.digits({"it": scheme})
    allocation = engine.space.uniform("it")
    found = finetune(engine, allocation, Training(epochs=2, batches=25, batch_size=50, learning_rate=0.01), tmp_path)
    assert min(found.losses) < 0.8 * found.losses[0]
    assert found.engine.score(allocation).loss == min(found.losses)
    pairs = [(engine.quantized(la.name, "it"), found.engine.quantized(la.name, "it")) for la in engine.space.layers]
    assert all(before.nbytes == after.nbytes for before, after in pairs)
    for key in {"codes"} | set(pairs[0][0].input_params) - {"input_zero_point"}:
        assert any(not torch.equal(before.tensors[key], after.tensors[key]) for before, after in pairs), key


@pytest.mark.parametrize("dense", [Integer(3, 5, symmetric=False, input=IntegerInput(4)), Codebook("e2m1", 16, "e4m3")], ids=str)
def test_rotated_weights_learn_as_they_are_stored(tiny, dense):
    """The student is the stored point before the first step, and its latents' gradients are those of a plain layer's weight."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(24, 12), torch.nn.ReLU(), torch.nn.Linear(12, 5)).eval()
    engine = tiny.engine(net, tiny.task(shape=(24,)), {"r": Rotated(dense)})
    allocation = engine.space.uniform("r")
    student = Student(engine, allocation)
    assert_same_tensors(stored(student.engine(), allocation), stored(engine, allocation) | stored_biases(engine, allocation))
    assert student.engine().quantized("1", "r").scheme == Rotated(dense)
    inputs, _ = engine.batches("search")[0]
    with engine.applied(allocation) as model:
        wanted = model(inputs)
    with student.installed():
        found = net(inputs)
    assert torch.equal(found, wanted)
    gradients = torch.autograd.grad(found.square().sum(), list(student.latents.values()))
    assert all(gradient.any() for gradient in gradients)
    matrix = torch.randn(3, 24, requires_grad=True)
    x = torch.randn(3, 24)
    (gradient,) = torch.autograd.grad((rotate_back(matrix) * x).sum(), matrix)
    assert torch.equal(gradient, kernels.rotate(x))


SCHEMES = {
    "w1": Integer(1),
    "w2z": Integer(2, group_size=5, symmetric=False),
    "w3t": Integer(3, group_size="tensor"),
    "w4a8": Integer(4, scale_dtype="float32", input=IntegerInput(8, "token")),
    "w8s": Integer(8, input=IntegerInput(4, "static")),
    "w8sz": Integer(8, input=IntegerInput(4, "static", symmetric=False)),
    "nf4": Codebook("nf4", 5),
    "ternary": Codebook("ternary"),
    "mxfp4": Codebook("e2m1", 32, "e8m0"),
    "nvfp4": Codebook("e2m1", 16, "e4m3"),
    "half": Float("float16"),
}


@pytest.mark.parametrize("first", range(0, len(SCHEMES), 3))
def test_before_training_the_student_is_the_stored_point_in_every_scheme(tiny, first):
    names = list(SCHEMES)[first:] + list(SCHEMES)[:first]
    engine = tiny.engine(tiny.net(), tiny.task(), {name: SCHEMES[name] for name in names})
    allocation = mixed(engine)
    student = Student(engine, allocation)
    assert_same_tensors(stored(student.engine(), allocation), stored(engine, allocation) | stored_biases(engine, allocation))
    inputs, _ = engine.batches("search")[0]
    with engine.applied(allocation) as model:
        wanted = model(inputs)
    before = tiny.state(engine.model)
    with student.installed():
        found = engine.model(inputs)
    tiny.assert_same_state(engine.model, before)
    assert torch.equal(found, wanted)
    gradients = torch.autograd.grad(found.square().sum(), list(student.latents.values()), allow_unused=True)
    for name, gradient in zip(student.latents, gradients, strict=True):
        assert gradient is not None, name
        assert gradient.any(), name


def stored_biases(engine, allocation):
    """Also those that were not corrected."""
    modules = [(m, engine.model.get_submodule(m)) for g in engine.space.groups for la in g.layers for m in la.modules]
    corrected = stored(engine, allocation)
    return {
        f"{name}.bias": corrected.get(f"{name}.bias", module.bias.detach())
        for name, module in modules
        if getattr(module, "bias", None) is not None
    }


def test_a_training_that_was_killed_ends_at_the_same_bits(trained, tmp_path, monkeypatch):
    allocation, training = mixed(trained), Training(epochs=4, batch_size=100, batches=3, seed=3)
    whole = finetune(trained, allocation, training, tmp_path / "whole")

    def killed(student, optimizer, training, epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        return module_train(student, optimizer, training, epoch)

    module_train = module.train_epoch
    monkeypatch.setattr(module, "train_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(trained, allocation, training, tmp_path / "killed")
    monkeypatch.undo()
    resumed = finetune(trained, allocation, training, tmp_path / "killed")
    assert resumed.losses == whole.losses
    assert_same_tensors(stored(resumed.engine, allocation), stored(whole.engine, allocation))
    again = finetune(trained, allocation, training, tmp_path / "killed")
    assert (again.losses, again.seconds) == (resumed.losses, resumed.seconds)
    assert_same_tensors(stored(again.engine, allocation), stored(whole.engine, allocation))
    name = checkpoint_name(allocation, training)
    contents = []
    for folder in ("whole", "killed"):
        with safe_open(tmp_path / folder / name, framework="pt") as file:
            contents.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    assert_same_tensors(*contents)
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {name}


def test_outputs_that_were_kept_for_other_codes_are_not_used(tiny):
    engine = tiny.digits({f"w{bits}": Integer(bits) for bits in (2, 4)})
    engine.score(Allocation({**engine.space.uniform("w2"), engine.space.names[-1]: "w4"}))  # so that what it shares is kept
    wanted = {scheme: engine.score(engine.space.uniform(scheme)).loss for scheme in ("w2", "w4")}
    layers = [la.name for group in engine.space.groups for la in group.layers]
    for scheme in ("w4", "w2", "w4"):  # each is asked for as w2, a new allocation every time
        weights = {(name, "w2"): engine.quantized(name, scheme) for name in layers}
        other = engine.with_weights(weights, {(name, "w2"): engine.biases(name, scheme) for name in layers})
        assert other.score(engine.space.uniform("w2")).loss == pytest.approx(wanted[scheme], rel=1e-5)


def test_a_training_that_makes_it_worse_keeps_the_point_as_it_was(trained, tmp_path):
    allocation = trained.space.uniform("w8")
    found = finetune(trained, allocation, Training(epochs=1, learning_rate=10.0), tmp_path)
    assert found.epoch == 0
    assert found.losses[1] > found.losses[0]
    assert found.engine.score(allocation) == trained.score(allocation)


def test_what_cannot_be_is_said(trained, tmp_path, monkeypatch):
    for wrong in ({"epochs": 0}, {"batch_size": 1.5}, {"batches": 0}, {"learning_rate": 0}, {"learning_rate": "fast"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Training(**wrong)
    allocation, training = trained.space.uniform("w4"), Training(epochs=1)
    (tmp_path / checkpoint_name(allocation, training)).write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="damaged"):
        finetune(trained, allocation, training, tmp_path)
    monkeypatch.setattr(trained.task, "training", lambda epoch, batch_size, seed: iter(()), raising=False)
    with pytest.raises(InputError, match="no batch to train on"):
        finetune(trained, allocation, training, tmp_path / "other")


@pytest.mark.slow
def test_the_command_trains_records_draws_and_exports(tmp_path, monkeypatch, capsys):
    """A run of the digits, one point trained twice, the search gone on with, and the trained point exported."""
    monkeypatch.chdir(tmp_path)

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["mpsearch", *words])
        main()
        return capsys.readouterr().out

    searched = ["search", "scheme=[w2,w4]", "quantizer=round_to_nearest", "metric=weight_mse", "n_trials=8", "hydra.run.dir=run"]
    command(*searched)
    folder = tmp_path / "run"
    before = Run.load(folder)
    words = ["finetune", "run=run", "pick.bits=2.5", "epochs=3", "batch_size=50", "batches=8", "learning_rate=0.01"]
    said = command(*words)
    assert "a gain of" in said
    after = Run.load(folder)
    assert after.front == before.front
    assert after.on("confirm") == before.on("confirm")
    ((allocation, row),) = after.finetuned("search").items()
    picked = pick(before, bits=2.5)
    assert allocation == picked.allocation
    assert row.loss < picked.loss
    assert f"loss on search {picked.loss:.4g} -> {row.loss:.4g}" in said
    assert (row.size_bytes, row.feasible, row.packed) == (picked.size_bytes, picked.feasible, False)
    confirmed = after.finetuned("confirm")[allocation]
    assert confirmed.packed
    page = (folder / "report.md").read_text()
    start = before.on("confirm")[allocation].loss
    sizes = f"{row.average_bits:.3f} | {row.average_bits_all:.3f} | {row.size_bytes:,}"
    assert f"| {sizes} | {start:.4g} | {confirmed.loss:.4g} |" in page
    assert "trained, confirm split" in (folder / "pareto.svg").read_text()
    assert "8 trials" in page

    command(*words)
    assert len(list((folder / "finetuned").iterdir())) == 1
    assert Run.load(folder).evaluations == after.evaluations  # nothing was new
    command("search", "run=run", "n_trials=9")
    gone_on = Run.load(folder)
    assert gone_on.finetuned("search")[allocation].loss == row.loss
    assert gone_on.on("search")[allocation] == before.on("search")[allocation]
    assert "## After training" in (folder / "report.md").read_text()

    said = command("export", "run=run", "pick.bits=2.5", "finetuned=true")
    (cells,) = (re.split(r" *[│┃] *", line) for line in said.splitlines() if "picked" in line)
    sizes = f"{row.average_bits:.2f}", f"{row.average_bits_all:.2f}", f"{row.size_bytes:,}"
    assert cells[1:6] == ["picked, trained", *sizes, f"{row.loss:.4g}"]
    assert cells[7] == f"{100 * confirmed.quality:.2f}"
    assert "picked, trained" not in command("export", "run=run", "pick.bits=2.5")
    command("export", "run=run", "pick.bits=2.5", "finetuned=true")
    exported = load_allocation(folder / "allocation.json")
    assert exported.data["scores"]["search"]["loss"] == row.loss
    model, task = exported.apply(digits()), Digits()
    hits = [task.quality(model(x), y) for x, y in task.batches("search")]
    assert float(torch.cat(hits).double().mean()) == row.quality


@pytest.mark.slow
def test_a_search_trains_its_front_before_it_reports(tmp_path, monkeypatch, capsys):
    """Off by default; a finished run gets it when it is gone on with, once; and the trained points stand beside the front."""
    monkeypatch.chdir(tmp_path)

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["mpsearch", *words])
        main()
        return Run.load(tmp_path / "run")

    quick = ["quantizer=round_to_nearest", "metric=weight_mse", "n_trials=6", "hydra.run.dir=run"]
    before = command("search", "scheme=[w2,w4]", *quick)
    assert not before.finetuned("search")
    after = command("search", "run=run", "confirm.finetune_steps=12")
    assert after.front == before.front
    assert {split: len(after.finetuned(split)) for split in ("search", "confirm")} == dict.fromkeys(
        ("search", "confirm"), len(after.front)
    )
    searched, confirmed = after.finetuned("search"), after.finetuned("confirm")
    assert all(searched[point.allocation].loss <= point.loss for point in after.front)
    assert searched[after.front[0].allocation].loss < after.front[0].loss
    assert all(evaluation.packed for evaluation in confirmed.values())
    page = (tmp_path / "run" / "report.md").read_text()
    for evaluation in list(confirmed.values())[-3:]:  # the report shows the latest
        assert (
            f"{evaluation.size_bytes:,} | {after.on('confirm')[evaluation.allocation].loss:.4g} | {evaluation.loss:.4g}" in page
        )
    assert command("search", "run=run", "confirm.finetune_steps=12").evaluations == after.evaluations
    for words, said in (
        (["confirm.finetune_steps=0"], "finetune_steps must be an integer of at least 1; got 0"),
        (["confirm.finetune_steps=5", "scheme=[fp16,bf16]"], "codes that can be trained"),
    ):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["mpsearch", "search", *quick[:-1], "hydra.run.dir=other", *words])
        with pytest.raises(SystemExit):
            main()
        assert said in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
