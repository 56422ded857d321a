"""Records NeMo's confidences of tokens and words for golden cases, into confidence.json beside it.

    python record_confidence.py CASE_FOLDER ...        with the Python of an environment with NeMo

Greedy decoding of each case's stored encoder output, one utterance at a time, under every measure;
nothing of this project is imported but the recorder of the golden cases.
"""

import copy
import json
import logging
import sys
from pathlib import Path

import torch
from make_golden import decode, set_decoding
from safetensors.torch import load_file

METHODS = [
    {"name": "max_prob", "alpha": 1.0},
    {"name": "max_prob", "alpha": 0.5},
    *(
        {"name": "entropy", "entropy_type": kind, "entropy_norm": norm, "alpha": alpha}
        for kind in ("gibbs", "tsallis", "renyi")
        for norm in ("lin", "exp")
        for alpha in (0.33, 1.0, 1.5)
    ),
]
AGGREGATIONS = ("min", "mean", "max", "prod")


def record(folder: Path) -> list[dict]:
    from nemo.collections.asr.models import ASRModel

    model = ASRModel.restore_from(str(folder / "model.nemo"), map_location="cpu").eval()
    of_rnnt, of_ctc = hasattr(model, "joint"), not hasattr(model, "joint")
    model.original_decoding = {"rnnt": copy.deepcopy(model.cfg.decoding)} if of_rnnt else {}
    if of_ctc or hasattr(model, "ctc_decoder"):
        section = model.cfg if of_ctc else model.cfg.aux_ctc
        model.original_decoding["ctc"] = copy.deepcopy(section.decoding)
    tensors, entries = load_file(folder / "golden.safetensors"), []
    for head in model.original_decoding:
        tdt = head == "rnnt" and bool(model.cfg.decoding.get("durations"))
        for k, method in enumerate(METHODS):
            for duration in (False, True) if tdt and k % 5 == 0 else (False,):
                confidence = {
                    "preserve_frame_confidence": True,
                    "preserve_token_confidence": True,
                    # NeMo 3.0 fails on words of a CTC head over characters
                    "preserve_word_confidence": head == "rnnt" or hasattr(model, "tokenizer"),
                    "exclude_blank": True,
                    "aggregation": AGGREGATIONS[k % 4],
                    "tdt_include_duration": duration,
                    "method_cfg": method,
                }
                set_decoding(model, head, confidence_cfg=confidence)
                hypotheses = []
                for encoded, n in zip(tensors["encoded"], tensors["encoded_len"]):
                    encoded = encoded[None, : int(n)].transpose(1, 2).contiguous()
                    (found,) = decode(model, head, encoded, n[None])
                    words = found.word_confidence
                    hypotheses.append(
                        {
                            "tokens": [round(float(x), 6) for x in found.token_confidence],
                            "words": words and [round(float(x), 6) for x in words],
                        }
                    )
                entries.append(
                    {
                        "head": ("tdt" if tdt else "rnnt") if head == "rnnt" else "ctc",
                        "method": method,
                        "aggregation": confidence["aggregation"],
                        "tdt_include_duration": duration,
                        "hyps": hypotheses,
                    }
                )
    return entries


def main():
    folders = [Path(name) for name in sys.argv[1:]]
    if not folders:
        raise SystemExit(__doc__)
    torch.set_num_threads(1)
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(logging.ERROR)
    recorded = {folder.name: record(folder) for folder in folders}
    out = Path(__file__).with_name("confidence.json")
    lines = [
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(e) for e in entries) + "\n]"
        for name, entries in recorded.items()
    ]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
