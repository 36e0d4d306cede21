"""The example on Ray Data, where Ray is installed."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import dkv
from dkv.models.bundled.tasks import held_out

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_results_are_those_of_one_process_and_a_repeat_does_what_is_left(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    rows = [{"id": f"p{number}", "prompt": prompt} for number, (prompt, _) in enumerate(held_out(12))]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = spec_from_file_location("ray_data", ROOT / "examples" / "ray_data.py")
    example = module_from_spec(spec)
    # Ray hands on what is in modules that cannot be imported elsewhere.
    spec.loader.exec_module(example)
    how = {"max_new_tokens": 16, "cache": "decode", "temperature": 1.0, "seed": 3}
    words = ["tiny", tmp_path / "in.jsonl", tmp_path / "out", "--actors", 2, "--batch", 3, "--blocks", 4]
    words += [word for name, value in how.items() for word in (f"--{name.replace('_', '-')}", value)]
    monkeypatch.setattr(sys, "argv", ["ray_data.py", *map(str, words)])
    try:
        example.main()
        files = sorted((tmp_path / "out").glob("*.json"))
        assert len(files) == 4
        files[0].unlink()
        example.main()
    finally:
        ray.shutdown()
    found = [json.loads(line) for file in (tmp_path / "out").glob("*.json") for line in file.read_text().splitlines()]
    expected = dkv.map("tiny", rows, progress=False, **how)
    assert len(found) == 12
    by_id = {record["id"]: record for record in found}
    for record in expected:
        assert {name: by_id[record["id"]][name] for name in ("text", "tokens", "seed")} == {
            name: record[name] for name in ("text", "tokens", "seed")
        }
