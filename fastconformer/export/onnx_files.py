"""Writes a graph as an ONNX file, and the same file with 8-bit weights.

Needs the packages `onnx` and `onnxruntime` (extra `export`).
"""

import logging
import warnings
from pathlib import Path

import torch

from .graphs import Graph

OPSET = 17  # as NeMo's exports: any runtime of the last years has it
MAX_FILE_BYTES = 2_000_000_000  # protobuf's limit is 2 GiB; weights beyond lie beside the file


def require_packages() -> None:
    """ValueError: a package of the extra `export` is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"exporting to ONNX needs the package {error.name}; pip install fastconformer[export]"
        ) from None


def write_graph(
    path: Path, graph: Graph, metadata: dict[str, str | int] | None = None, int8: bool = False
) -> None:
    """Traces the graph, checks the file with onnx's checker, writes it; weights of more than 2 GB
    go to `<name>.data` beside it. int8: matrix products' weights in 8 bits, see `quantized`."""
    import onnx

    scratch = path.parent / f"{path.stem}.trace"
    scratch.mkdir()
    graph.module.eval()  # the exporter puts it back, with the model's own parts, as it finds it
    raw = scratch / "graph.onnx"
    with warnings.catch_warnings(), torch.enable_grad():
        # With gradients on, the networks run in their plain form, in one piece: see tiles.py.
        warnings.simplefilter("ignore")  # of the tracer, on comparisons of sizes
        torch.onnx.export(
            graph.module,
            graph.example,
            raw,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_axes=graph.dynamic,
            opset_version=OPSET,
            dynamo=False,
        )
    if int8:
        raw = quantized(raw)
    onnx.checker.check_model(raw)
    document = onnx.load(raw)
    for key, value in (metadata or {}).items():
        document.metadata_props.add(key=key, value=str(value))
    document.producer_name = "fastconformer"
    n_bytes = sum(f.stat().st_size for f in scratch.iterdir() if f == raw or f.suffix != ".onnx")
    if n_bytes > MAX_FILE_BYTES:
        data = f"{path.name}.data"
        onnx.save(document, path, save_as_external_data=True, location=data)
    else:
        onnx.save(document, path)
    for file in scratch.iterdir():
        file.unlink()
    scratch.rmdir()


def quantized(path: Path) -> Path:
    """A file beside it whose matrix products have 8-bit weights, a scale for each output, and take
    their inputs in 8 bits as they come.

    Only matrix products: with convolutions in 8 bits too, as clients' own scripts do it, texts are
    ruined. Seven of the eight bits are used: without VNNI an x86 CPU adds pairs in 16 bits.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = path.with_name("int8.onnx")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it speaks of each tensor that is none of a matrix product
    try:
        quantize_dynamic(
            path,
            target,
            op_types_to_quantize=["MatMul"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
    finally:
        logging.disable(before)
    return target
