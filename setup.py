"""Installs the packages; building needs no torch. The versions that CI runs: constraints.txt."""

from setuptools import find_packages, setup

TRAIN = [
    "omegaconf>=2.3",
    "bitsandbytes>=0.45",
    "numba>=0.60",
    "jiwer>=3.0",
    "tensorboard>=2.16",
    "rich>=13",
]
QUICKSTART = [*TRAIN, "espeakng-loader>=0.2.4"]

setup(
    name="fastconformer",
    version="0.1.0",
    description="FastConformer and Parakeet speech recognition in plain PyTorch",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(
        include=["fastconformer*", "rwkv_cuda*", "training*", "converters*", "benchmarks*"]
    ),
    install_requires=[
        "torch>=2.6,<3",  # 2.6: nn.utils.get_total_norm, which training.finetune calls
        "numpy>=1.26,<3",
        "sentencepiece>=0.2",
        "safetensors>=0.4.3",
        "soundfile>=0.12.1",  # its wheels bring a libsndfile that reads Ogg Opus and MP3
        "soxr>=0.3.7",
        "pyyaml>=6",
    ],
    extras_require={
        "train": TRAIN,
        "quickstart": QUICKSTART,
        "test": [*QUICKSTART, "pytest>=8", "hypothesis>=6.100", "ruff>=0.9"],
    },
)
