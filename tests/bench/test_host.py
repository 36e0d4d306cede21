"""What the host starts in a step stays within its budget."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dkv.bench import host
from dkv.bench.shapes import shape
from dkv.cli import main

BUDGET = json.loads(Path(__file__).with_name("launch_budget.json").read_text())
# As few layers as can be told apart; the counts do not depend on the sizes of products.
SMALL = {"num_layers": 3, "vocab_size": 64, "intermediate_size": 64, "mask_token_id": 63}
SPECS = {name: replace(shape(name), **SMALL) for name in ("llada-8b", "dream-7b")}


@pytest.mark.parametrize("name", ["llada-8b", pytest.param("dream-7b", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", host.CASES)
def test_steps_stay_within_their_budget(name, case):
    rows = list(host.measure(SPECS[name], [case]))
    assert [row["step"] for row in rows] == (["full"] if case == "plain" else ["full", "cached"])
    for row in rows:
        assert row["per_layer"] <= BUDGET["a layer"][row["step"]], row
        # A shifted model finds the slots that predict others.
        extra = 12 if SPECS[name].shifted else 0
        assert row["launches"] - 3 * row["per_layer"] <= BUDGET["outside the layers"][case] + extra, row
        assert row["uploads"] <= BUDGET["uploads"] and row["waits"] <= BUDGET["waits"], row


def test_every_kind_is_counted():
    with host.Count() as count:
        x = torch.ones(4, 4)
        x.view(16).relu()
        x[x > 0].sum().item()
        torch.tensor([1, 2]) + 1
        torch.empty(3)
    # ones, relu, gt, index, sum, add.
    assert count.kinds == {"aten": 6, "waits": 1, "uploads": 1}


def test_products_are_of_the_right_shape_and_not_computed():
    with host.Count() as count:
        found = torch.nn.functional.linear(torch.ones(5, 8), torch.empty(3, 8, device="meta"))
    assert found.shape == (5, 3) and not found.any()
    assert count.kinds == {"aten": 2}  # ones, and the product


def test_command(tmp_path, capsys):
    path = tmp_path / "host.json"
    assert main(["bench", "--host", "--shape", "d128x4", "--json", str(path)]) == 0
    text, rows = capsys.readouterr().out, json.loads(path.read_text())["host"]["rows"]
    assert "d128x4, 4 layers" in text and {row["case"] for row in rows} == {*host.CASES}
    assert all(str(row["launches"]) in text for row in rows)


def test_standard_output_is_json_alone(capfd):
    assert main(["bench", "--host", "--shape", "d128x4", "--json", "-"]) == 0
    out, err = capfd.readouterr()
    assert len(json.loads(out)["host"]["rows"]) > len(host.CASES) and "d128x4, 4 layers" in err


@pytest.mark.parametrize("option", ["--batch=2", "--model=tiny", "--rounds=1", "--all", "--floor", "--device=cpu"])
def test_options_without_effect(option, capsys):
    assert main(["bench", "--host", option]) == 2
    assert f"{option.split('=')[0]} has no effect on --host" in capsys.readouterr().err


def test_no_layers(capsys):
    assert main(["bench", "--host", "--layers", "0"]) == 2
    assert "--layers must be at least 1, got 0" in capsys.readouterr().err


TIMED = """
from dataclasses import replace
from dkv.bench import host
from dkv.bench.shapes import shape

spec = replace(shape("dream-7b"), num_layers=2)
rows = list(host.measure(spec, ["decode 8"], timed=True))
assert all(row["host_ms"] > 0 for row in rows), rows
print(host.table({"rows": rows}))
"""


def test_host_time_of_steps():
    """In a process of its own, where Triton compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", TIMED], env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and lines[0].endswith("host ms") and lines[1].split()[2:3] == ["full"], done.stderr


def test_host_time_needs_compiled_kernels():
    with pytest.raises(RuntimeError, match=r"^TRITON_INTERPRET=1 runs the kernels themselves"):
        host.times_of(SPECS["llada-8b"], {})
