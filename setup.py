"""Package metadata.

The folders stand side by side in the repository, but only the name `dkv` is installed: top-level
packages called `kernels` or `models` would collide with those of other people.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Read, not imported: the build environment has no torch.
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "dkv" / "version.py").read_text("utf-8"), re.M)[1]

# Links to other files of the repository lead nowhere on a package index: their text is kept alone.
DESCRIPTION = re.sub(r"\[([^]]+)\]\((?!https?://)[^)]+\)", r"\1", (ROOT / "README.md").read_text("utf-8"))

LINT = ["ruff"]
BENCH = ["matplotlib>=3.8"]
EVAL = ["lm_eval>=0.4.13,<0.5"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "prometheus_client>=0.20"]
# Small, and free of other packages: quantises plain layers (docs/devices.md).
TORCHAO = ["torchao>=0.18"]
# Large, and used by an example alone: not among what the tests need.
RAY = ["ray[data]>=2.50"]
# The packaging tests build without isolation, so they need the build backend too.
TEST = [
    "pytest>=8",
    "pytest-benchmark",
    "pytest-xdist",
    "hypothesis",
    "setuptools>=77",
    "httpx",
    "openai",
    *BENCH,
    *EVAL,
    *SERVE,
    *TORCHAO,
]
FOLDERS = {"dkv": "dkv", "dkv.kernels": "kernels", "dkv.models": "models", "dkv.bench": "bench"}
INNER = [f"{name}.{inner}" for name, folder in FOLDERS.items() for inner in find_packages(str(ROOT / folder))]

setup(
    name="dkv",
    version=VERSION,
    description="Fast decoding of diffusion language models (LLaDA, Dream) with dKV-Cache",
    long_description=DESCRIPTION,
    long_description_content_type="text/markdown",
    author="The dkv authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["diffusion language model", "dKV-Cache", "key-value cache", "LLaDA", "Dream", "Triton", "PyTorch"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "triton>=3.4; platform_system == 'Linux'",
        "transformers>=4.57",
        "numpy",
        "safetensors",
        "huggingface_hub",
        "tqdm",
    ],
    extras_require={
        "bench": BENCH,
        "eval": EVAL,
        "serve": SERVE,
        "ray": RAY,
        "torchao": TORCHAO,
        "test": TEST,
        "lint": LINT,
        "dev": [*TEST, *LINT, "build"],
    },
    packages=[*FOLDERS, *INNER],
    package_dir=FOLDERS,
    # Named by suffix, so that a training checkpoint left in the folder is not shipped.
    package_data={
        **{package: ["*.html", "*.css", "*.js"] for package in ("dkv.tools.trace", "dkv.serving.page")},
        "dkv.models": [f"tiny*/*.{suffix}" for suffix in ("json", "jsonl", "safetensors", "txt")],
    },
    entry_points={
        "console_scripts": ["dkv = dkv.__main__:main"],
        # Where later releases of lm-eval than 0.4.13 look for models of other packages.
        "lm_eval.models": ["dkv = dkv.integrations.lm_eval.harness:DkvLM"],
    },
    zip_safe=False,
)
