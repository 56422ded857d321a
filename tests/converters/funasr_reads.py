"""What FunASR itself makes of folders: run by tests/converters/test_funasr.py with the Python of an
environment that has FunASR (1.4.16 was tried) and kaldi-native-fbank or torchaudio; imports nothing
of this project:

    python funasr_reads.py FOLDER[,FOLDER...] AUDIO...

Prints a JSON line a folder: {"folder": path, "texts": [...], "ctc_texts": [...], "ids": [...]}.
"""

import contextlib
import json
import sys

import torch


def read(folder: str, clips: list[str]) -> dict:
    from funasr import AutoModel
    from funasr.models.fun_asr_nano import model as module

    module.forced_align = lambda *_: []  # its times need torchaudio
    with contextlib.redirect_stdout(sys.stderr):
        model = AutoModel(model=folder, device="cpu", disable_update=True, disable_pbar=True)
        found = {"folder": folder, "texts": [], "ctc_texts": []}
        for clip in clips:
            (result,) = model.generate(input=[clip], cache={}, batch_size=1)
            found["texts"].append(result["text"])
            found["ctc_texts"].append(result.get("ctc_text"))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in sys.argv[1].split(","):
        print(json.dumps(read(path, sys.argv[2:])))
