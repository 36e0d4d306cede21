"""lm-eval's own command line, with the bundled model and tasks of our own."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model, model_registry

from dkv.integrations.lm_eval.harness import DkvLM
from dkv.lm_eval import register
from dkv.models.bundled.tasks import held_out

ROOT = Path(__file__).parents[3]


def test_lm_eval_finds_the_model_by_registration_and_by_entry_point():
    register()
    register()
    assert get_model("dkv") is DkvLM
    assert "hf" in model_registry
    model_registry.register(
        "dkv-by-entry-point", target=EntryPoint("dkv", "dkv.integrations.lm_eval.harness:DkvLM", "lm_eval.models")
    )
    assert get_model("dkv-by-entry-point") is DkvLM


GENERATION = """
task: balance
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["="], do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOICE = """
task: balance_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 1
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
def test_lm_evals_own_command_line_scores_the_bundled_model(tmp_path):
    problems = held_out(3)
    rows = [{"prompt": p, "answer": a, "choices": [str(99 - int(a[:2])), a[:2]]} for p, a in problems]
    data = tmp_path / "problems.json"
    data.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    (tmp_path / "tasks").mkdir()
    for name, task in (("generation", GENERATION), ("choice", CHOICE)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(task.format(data=data), "utf-8")
    words = (
        "-m dkv.lm_eval run --model dkv --tasks balance,balance_choice --batch_size 2 --seed 7 "
        "--model_args pretrained=tiny,cache=decode,refresh=8,max_new_tokens=64,mc_num=8"
    )
    paths = ["--include_path", tmp_path / "tasks", "--output_path", tmp_path / "out"]
    command = [sys.executable, *words.split(), *paths]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **offline, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text("utf-8"))
    lm = DkvLM("tiny", cache="decode", refresh=8, max_new_tokens=64, batch_size=3)
    requests = [Instance("generate_until", {}, (p, {"until": ["="]}), i) for i, (p, _) in enumerate(problems)]
    right = [text == a for text, (_, a) in zip(lm.generate_until(requests, disable_tqdm=True), problems, strict=True)]
    assert found["results"]["balance"]["exact_match,none"] == pytest.approx(sum(right) / 3)
    assert sum(right) >= 2
    assert found["results"]["balance_choice"]["acc,none"] >= 0.5
    info = found["config"]["dkv"]
    (part,) = info["generation"]
    assert (part["requests"], part["new_tokens"], info["seed"]) == (3, 3 * 64, 7)
    assert part["computed_share"] == pytest.approx(lm.get_model_info()["dkv"]["generation"][0]["computed_share"])
    assert part["tokens_per_second"] > 0
    assert part["passes"] == 2 * 64
    assert info["likelihood"]["requests"] == 6
