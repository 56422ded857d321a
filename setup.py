"""Installs the packages; building needs no torch. The versions that CI runs: constraints.txt.

Where a CUDA torch and nvcc are (pip's --no-build-isolation lets it see them), the CUDA kernels are
compiled too; elsewhere the first use compiles them, or plain PyTorch serves.
"""

import importlib.util
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
source = (HERE / "fastconformer" / "__init__.py").read_text(encoding="utf-8")
version = re.search(r'^__version__ = "(.+)"$', source, re.M)[1]  # importing it would need torch


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        if importlib.util.find_spec("torch") is None:
            return
        import torch

        if torch.version.cuda is None:
            return
        sys.path.insert(0, str(Path(__file__).parent))
        from rwkv_cuda import build

        if build.find_nvcc() is None:
            return
        path, _ = build.compile_library(build.local_arches() or build.TARGETS)
        if not self.editable_mode:
            target = Path(self.build_lib) / "rwkv_cuda" / "built"
            target.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(path), str(target))


FAST = ["numba>=0.60"]  # the CPU's compiled decoding and layers
TRAIN = [
    "omegaconf>=2.3",
    "bitsandbytes>=0.45",
    *FAST,
    "jiwer>=3.0",
    "tensorboard>=2.16",
    "rich>=13",
]
EXPORT = ["onnx>=1.16", "onnxruntime>=1.18"]
QUICKSTART = [*TRAIN, "espeakng-loader>=0.2.4"]
MEDIA = ["av>=14"]  # PyAV: its wheels bring FFmpeg
HUB = ["huggingface_hub>=0.30"]
EVAL = ["whisper-normalizer>=0.1.10", "sacrebleu>=2.4"]
SERVE = ["starlette>=0.45", "uvicorn>=0.30", "python-multipart>=0.0.18", "websockets>=13"]
LISTEN = ["sounddevice>=0.4.6"]  # PortAudio for the microphone
LLM = ["tokenizers>=0.20"]  # Qwen's tokenizer, of Fun-ASR-Nano
LHOTSE = ["lhotse>=1.32", "urllib3>=2"]  # which Lhotse imports and does not ask for
DATA = [*LHOTSE, "datasets>=4.4"]

setup(
    name="fastconformer",
    version=version,
    description="FastConformer and Parakeet speech recognition in plain PyTorch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="speech recognition, ASR, FastConformer, Parakeet, NeMo, RNNT, TDT, CTC, PyTorch",
    project_urls={
        "Model": "https://arxiv.org/abs/2305.05084",  # FastConformer
        "Reference": "https://github.com/NVIDIA/NeMo",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    packages=find_packages(
        include=["fastconformer*", "rwkv_cuda*", "training*", "converters*", "benchmarks*"]
    ),
    entry_points={"console_scripts": ["fastconformer = fastconformer.__main__:main"]},
    package_data={"rwkv_cuda": ["csrc/*"], "fastconformer.serving": ["page/*"]},
    cmdclass={"build_py": BuildWithKernels},
    install_requires=[
        "torch>=2.7,<3",  # 2.7: operators that take list[...]; Triton 3.3, with tl.gather
        "numpy>=1.26,<3",
        "sentencepiece>=0.2",
        "safetensors>=0.4.3",
        "soundfile>=0.12.1",  # its wheels bring a libsndfile that reads Ogg Opus and MP3
        "soxr>=0.3.7",
        "pyyaml>=6",
    ],
    extras_require={
        "fast": FAST,
        "train": TRAIN,
        "quickstart": QUICKSTART,
        "export": EXPORT,
        "serve": SERVE,
        "listen": LISTEN,
        "llm": LLM,
        "media": MEDIA,
        "hub": HUB,
        "eval": EVAL,
        "data": DATA,
        # Triton's interpreter runs the GPU kernels' tests where there is no GPU.
        "test": [
            *QUICKSTART,
            *EXPORT,
            *SERVE,
            *MEDIA,
            *HUB,
            *EVAL,
            *LHOTSE,
            "httpx>=0.27",
            *LLM,
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            'triton>=3; platform_system == "Linux"',
        ],
    },
)
