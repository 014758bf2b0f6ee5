"""A folder of transformers and a text on the command line: searched, resumed, solved for another budget and exported."""

import json
import subprocess
import sys

import pytest

from tests.models.families import tiny

transformers = pytest.importorskip("transformers")
byte_tokenizer = pytest.importorskip("tests.models.byte_tokenizer")
LAUNCH = "import sys, torch; torch.set_num_threads(1); from mpsearch.cli import main; sys.argv[0] = 'mpsearch'; main()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`my-model` and `my.txt`."""
    path = tmp_path_factory.mktemp("hf")
    tiny(transformers, "llama").save_pretrained(path / "my-model")
    byte_tokenizer.save_byte_tokenizer(transformers, path / "my-model")
    (path / "my.txt").write_text("\n\n".join(f"Paragraph {i} says as little as the one before it." for i in range(60)))
    return path


def run(folder, *words):
    ended = subprocess.run([sys.executable, "-c", LAUNCH, *words], cwd=folder, capture_output=True, text=True, timeout=300)
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.slow
def test_from_a_folder_to_an_exported_allocation(folder):
    words = ["model=hf", "model.path=./my-model", "task=text", "task.path=my.txt", "task.window=32", "budget.bits=4"]
    small = ["scheme=[w2,w4,w8]", "quantizer=gptq", "n_trials=6", "n_seeds=3", "confirm.n_points=2", "hydra.run.dir=run"]
    status, said = run(folder, "search", *words, *small)
    assert status == 0, said
    assert "perplexity" in said
    page = (folder / "run" / "report.md").read_text()
    assert page.startswith("# my-model on Text")
    assert "16 windows of 32 tokens from" in page
    for command in (["search", "run=run", "n_trials=8"], ["solve", "run=run", "budget.bits=3"], ["export", "run=run"]):
        status, said = run(folder, *command)
        assert status == 0, said
    allocation = json.loads((folder / "run" / "allocation.json").read_text())
    assert "model.layers.0.self_attn.q_proj" in json.dumps(allocation)


@pytest.mark.slow
def test_a_run_for_vllm_ends_in_a_folder_that_transformers_opens(folder):
    pytest.importorskip("compressed_tensors")
    words = ["model=hf", "model.path=./my-model", "task=text", "task.path=my.txt", "task.window=32", "runtime=vllm"]
    small = ["scheme=[w4,w8,fp16]", "quantizer=gptq", "n_trials=6", "n_seeds=3", "confirm.n_points=2", "hydra.run.dir=vllm"]
    for command in (["search", *words, *small], ["export", "run=vllm", "pick.bits=12"]):
        status, said = run(folder, *command)
        assert status == 0, said
    assert "vllm/compressed_tensors/config.json" in said
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "vllm" / "compressed_tensors")
    assert "quantization_config" in model.config.to_dict()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "vllm" / "compressed_tensors")
    assert model(**tokenizer("Paragraph", return_tensors="pt")).logits.isfinite().all()


@pytest.mark.slow
def test_mistakes_are_one_sentence(folder):
    task = ["task=text", "task.path=my.txt"]
    for words, sentence in [
        (["model=hf", *task], "model.path must be given"),
        (["model=hf", "model.path=nowhere", *task], "There is no folder "),
        (["model=hf", "model.path=my-model", "task=text", "task.path=nowhere.txt"], "There is no text "),
        (
            ["model=hf", "model.path=my-model", *task, "task.window=4096"],
            "windows of 4,096 tokens left for the calibration split",
        ),
    ]:
        status, said = run(folder, "search", *words)
        assert status == 2, said
        assert sentence in said
        assert "Traceback" not in said
