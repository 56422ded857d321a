"""Install. No torch is needed to build; the numbers' exact versions for CI: constraints.txt."""

from setuptools import find_packages, setup

TRAIN = [
    "omegaconf>=2.3",
    "bitsandbytes>=0.45",
    "numba>=0.60",
    "jiwer>=3.0",
    "tensorboard>=2.16",
    "rich>=13",
]
SPEAK = ["espeakng-loader>=0.2.4"]

setup(
    name="fastconformer",
    version="0.1.0",
    description="FastConformer and Parakeet speech recognition in plain PyTorch",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(
        include=["fastconformer*", "training*", "converters*", "benchmarks*"]
    ),
    install_requires=[
        "torch>=2.6,<3",  # TODO: lower bound
        "numpy>=1.26",
        "sentencepiece>=0.2",
        "safetensors>=0.4.3",
        "soundfile>=0.12.1",  # its wheels bring libsndfile 1.2: Ogg Opus and MP3
        "soxr>=0.3.7",
        "pyyaml>=6",
    ],
    extras_require={
        "train": TRAIN,
        "quickstart": TRAIN + SPEAK,
        "test": [*TRAIN, *SPEAK, "pytest>=8", "hypothesis>=6.100", "ruff>=0.9"],
    },
)
