"""dkv imports from a checkout, an editable install and a wheel, with or without a GPU or Triton.

The environments made here see the packages of the running one (torch above all) through a path
file, so nothing is downloaded.
"""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Folder in the repository -> folder where it is installed.
FOLDERS = {"dkv": "dkv", "kernels": "dkv/kernels", "models": "dkv/models", "bench": "dkv/bench"}

LOCATE = """
import json, dkv, dkv.kernels, dkv.models, torch
assert not torch.cuda.is_initialized(), "the import initialised CUDA"
print(json.dumps([module.__file__ for module in (dkv, dkv.kernels, dkv.models)]))
"""

IMPORT_ALL = """
import importlib, pkgutil, sys
without_triton = "triton" in sys.modules and sys.modules["triton"] is None
for name in ("dkv", "dkv.kernels", "dkv.models", "dkv.bench"):
    # The first entry alone: in a checkout the second is the repository root, where setup.py lies.
    path = importlib.import_module(name).__path__[0]
    for module in pkgutil.walk_packages([path], name + "."):
        # The Triton kernels are loaded on demand, and by nobody where there is no Triton.
        last = module.name.rpartition(".")[2]
        of_triton = ("triton", "kernel", "gap", "ranking", "arguments", "launch", "launches", "prepared")
        of_triton += ("audit", "cases", "autotune")
        needs_triton = (".kernels." in module.name and last in of_triton) or last in ("null_driver", "bare")
        if not module.name.endswith("__main__") and not (without_triton and needs_triton):
            importlib.import_module(module.name)
"""


def run(*command: object, cwd: Path, **env: str) -> str:
    """Standard output of a command that has to succeed."""
    base = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=base | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: object, cwd: Path) -> str:
    return run(sys.executable, "-m", "pip", *arguments, cwd=cwd, PIP_NO_INDEX="1")


def install(python: Path, *what: object) -> None:
    # An outer dkv is visible through the path file; pip would take it for an older installation.
    options = ("-q", "--no-deps", "--no-build-isolation", "--ignore-installed")
    pip("--python", python, "install", *options, *what, cwd=python.parent)


def locate(python: Path, cwd: Path) -> list[Path]:
    """The folders that dkv, dkv.kernels and dkv.models are imported from."""
    return [Path(file).resolve().parent for file in json.loads(run(python, "-c", LOCATE, cwd=cwd).splitlines()[-1])]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build reads, so that the checkout stays free of build products."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.pt", "*.tmp"))
    return copy


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a fresh environment that has our dependencies, but not dkv."""
    home = tmp_path / "env"
    venv.create(home, symlinks=True)
    # A folder named in a path file does not have its own path files read, so an outer editable dkv stays out.
    packages = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    (site_packages(home / "bin" / "python") / "outer.pth").write_text("\n".join(packages) + "\n")
    find = "import importlib.util as u; print(u.find_spec('dkv'))"
    if run(home / "bin" / "python", "-c", find, cwd=tmp_path).strip() != "None":
        pytest.skip("dkv is installed here as plain files, which the fresh environment would see")
    return home / "bin" / "python"


def site_packages(python: Path) -> Path:
    return next(python.parent.parent.glob("lib/python3*/site-packages"))


def test_checkout_needs_no_installation(python: Path):
    assert locate(python, cwd=ROOT) == [ROOT / "dkv", ROOT / "kernels", ROOT / "models"]


FOUND = "from transformers.utils import is_kernels_available as found\nassert not found()\n"


@pytest.mark.slow
def test_transformers_finds_our_folder_called_kernels():
    """In a checkout transformers takes kernels/ for the package of that name and imports it. The other order: below."""
    run(sys.executable, "-c", f"import transformers.modeling_utils\nimport dkv.models\n{FOUND}", cwd=ROOT)


def test_editable_install(python: Path, source: Path, tmp_path: Path):
    install(python, "-e", source)
    assert locate(python, cwd=tmp_path) == [source / "dkv", source / "kernels", source / "models"]


@pytest.mark.slow
def test_wheel_installs_dkv_alone_and_complete(python: Path, source: Path, tmp_path: Path):
    bundled = [config.parent for config in source.glob("models/*/config.json")]
    for folder in bundled:
        (folder / "checkpoint.pt").write_text("a leftover of training")
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("dkv-*.whl")
    shipped = set(zipfile.ZipFile(wheel).namelist())
    for folder, target in FOLDERS.items():
        for kind in ("py", "html", "css", "js"):
            code = {f"{target}/{file.relative_to(source / folder)}" for file in (source / folder).rglob(f"*.{kind}")}
            assert code <= shipped
    weights = {
        f"dkv/models/{folder.name}/{file.name}"
        for folder in bundled
        for file in folder.iterdir()
        if file.name != "checkpoint.pt"
    }
    # Five of each model, and the passages of `tiny-text`.
    assert len(weights) == 26 and {name for name in shipped if "/tiny" in name} == weights

    install(python, wheel)
    site = site_packages(python)
    names = {entry.name for entry in site.iterdir()} - {"outer.pth"}
    assert names == {"dkv", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}
    assert locate(python, cwd=tmp_path) == [site / "dkv", site / "dkv" / "kernels", site / "dkv" / "models"]
    assert (python.parent / "dkv").exists()


@pytest.mark.parametrize(
    "hide",
    [
        pytest.param("", id="as is", marks=pytest.mark.slow),
        pytest.param("import sys; sys.modules['triton'] = None", id="without triton"),
    ],
)
def test_A13_every_module_imports_without_a_gpu(hide: str):
    run(sys.executable, "-c", f"{hide}{IMPORT_ALL}{FOUND}", cwd=ROOT, CUDA_VISIBLE_DEVICES="")
