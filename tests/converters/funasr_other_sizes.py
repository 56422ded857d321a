"""Makes a Fun-ASR-Nano of other sizes and options with FunASR itself, and records what it computes:
run by tests/converters/test_funasr.py with the Python of an environment that has FunASR:

    python funasr_other_sizes.py CASE OUT DOWNSAMPLE LOW_FRAME_RATE

CASE: the golden folder, whose tokenizers and clips are taken. OUT gets a folder in the released
layout with random weights, and in it reference.pt: of each clip features, encoded rows, adapted
rows, CTC log-probabilities and both texts.
"""

import contextlib
import json
import os
import shutil
import sys

import soundfile
import torch
import yaml


def main(case: str, out: str, downsample: int, low_frame_rate: bool) -> None:
    from funasr import AutoModel
    from funasr.models.fun_asr_nano import model as module

    torch.set_num_threads(1)
    torch.manual_seed(3)
    module.forced_align = lambda *_: []  # its times need torchaudio
    shutil.copytree(case, out)
    with open(f"{out}/config.yaml", encoding="utf-8") as file:
        config = yaml.safe_load(file)
    config["audio_encoder_conf"] |= {"output_size": 48, "attention_heads": 6, "linear_units": 80,
                                     "num_blocks": 3, "tp_blocks": 1, "kernel_size": 7}  # fmt: skip
    config["audio_adaptor_conf"] |= {"downsample_rate": downsample, "ffn_dim": 40, "n_layer": 1,
                                     "llm_dim": 48, "encoder_dim": 48, "attention_heads": 4,
                                     "use_low_frame_rate": low_frame_rate}  # fmt: skip
    config["ctc_decoder_conf"] |= {"ffn_dim": 56, "n_layer": 3, "llm_dim": 48, "encoder_dim": 48,
                                   "attention_heads": 2}  # fmt: skip
    config["ctc_vocab_size"] = 700
    config["frontend_conf"] |= {"n_mels": 40, "lfr_m": 5, "lfr_n": 4, "window": "hanning"}
    config["dataset_conf"] |= {"do_think": False, "sys_prompt": False}
    config["dataset_conf"]["audio_adaptor_downsample_rate"] = downsample
    path = f"{out}/Qwen3-0.6B/config.json"
    with open(path, encoding="utf-8") as file:
        llm = json.load(file)
    llm |= {"head_dim": 16, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6,
            "num_hidden_layers": 3, "num_key_value_heads": 2, "tie_word_embeddings": False,
            "rope_theta": 10000, "rms_norm_eps": 1e-5}  # fmt: skip
    with open(path, "w", encoding="utf-8") as file:
        json.dump(llm, file)
    os.chdir(out)
    parts = {k: v for k, v in config.items() if k not in ("model", "model_conf")}
    parts = json.loads(json.dumps(parts))  # it writes into what it is given
    with contextlib.redirect_stdout(sys.stderr):
        model = module.FunASRNano(input_size=5 * 40, **parts)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.15 if "llm" in name else 0.3)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        torch.save({"state_dict": model.state_dict()}, "model.pt")
        with open("config.yaml", "w", encoding="utf-8") as file:
            yaml.safe_dump(config, file, allow_unicode=True, sort_keys=False)
        loaded = AutoModel(model=".", device="cpu", disable_update=True, disable_pbar=True)
        found = [of_clip(loaded, f"audio/clip_{i}.wav") for i in range(4)]
    torch.save(found, "reference.pt")


@torch.no_grad()
def of_clip(loaded, clip: str) -> dict:
    model, samples = loaded.model, torch.from_numpy(soundfile.read(clip, dtype="float32")[0])
    features, lengths = loaded.kwargs["frontend"](samples[None], torch.tensor([len(samples)]))
    encoded, encoded_lengths = model.encode(features.clone(), lengths)
    adapted, _ = model.audio_adaptor(encoded, encoded_lengths)
    rows, _ = model.ctc_decoder(encoded, encoded_lengths)
    (said,) = loaded.generate(input=[clip], cache={}, batch_size=1, max_length=20)
    return {
        "features": features[0],
        "encoded": encoded[0],
        "adapted": adapted[0],
        "log_probs": model.ctc.log_softmax(rows)[0],
        "text": said["text"],
        "ctc_text": said["ctc_text"],
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "yes")
