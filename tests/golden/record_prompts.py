"""Records what NeMo makes of a streaming golden case with a language prompt behind its encoder, and
with `<EOU>` in its vocabulary, into prompts.{json,safetensors} and eou.json beside it.

    python record_prompts.py CASE_FOLDER        with the Python of an environment with NeMo

The weights are the case's. With a prompt: NeMo's `prompt_kernel` behind the encoder, which passes
frames on nearly as they are under "auto", and moves them under the other languages. With `<EOU>`:
this is the comma's name, and `<EOB>` the exclamation mark's, as user-defined and as control pieces.
Models are saved and restored by NeMo before anything is recorded.
"""

import io
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from nemo.collections.asr.models import ASRModel
from nemo.collections.asr.parts.utils.streaming_utils import CacheAwareStreamingAudioBuffer
from omegaconf import OmegaConf, open_dict
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2

CLASS = (
    "nemo.collections.asr.models.hybrid_rnnt_ctc_bpe_models_prompt."
    "EncDecHybridRNNTCTCBPEModelWithPrompt"
)
LANGUAGES = {"auto": 5, "en-US": 0, "en": 0, "de-DE": 3}
N_PROMPTS = 6
MARKS = {",": "<EOU>", "!": "<EOB>"}
KINDS = {"control": 3, "user_defined": 4}  # SentencePiece's numbers


def main(folder: Path):
    golden = load_file(folder / "golden.safetensors")
    with tempfile.TemporaryDirectory() as temporary:
        record_prompts(folder, golden, f"{temporary}/prompted.nemo")
        record_eou(folder, golden, Path(temporary))


def record_prompts(folder: Path, golden: dict, path: str):
    config = ASRModel.restore_from(str(folder / "model.nemo"), return_config=True)
    width = config.encoder.d_model
    with open_dict(config):
        config.target = CLASS
        config.model_defaults.update(
            initialize_prompt_feature=True, num_prompts=N_PROMPTS, prompt_dictionary=LANGUAGES
        )
    model = ASRModel.restore_from(
        str(folder / "model.nemo"), override_config_path=config, strict=False, map_location="cpu"
    )
    generator = torch.Generator().manual_seed(1)
    first, last = model.prompt_kernel[0], model.prompt_kernel[2]
    eye = torch.eye(width)
    prompts = 0.3 * torch.randn(2 * width, N_PROMPTS, generator=generator)
    prompts[:, LANGUAGES["auto"]] = 0
    noise = 0.01 * torch.randn(2 * width, width, generator=generator)
    first.weight.data = torch.cat((torch.cat((eye, -eye)) + noise, prompts), 1)
    first.bias.data = 0.01 * torch.randn(2 * width, generator=generator)
    noise = 0.01 * torch.randn(width, 2 * width, generator=generator)
    last.weight.data = torch.cat((eye, -eye), 1) + noise
    last.bias.data = 0.01 * torch.randn(width, generator=generator)
    model.save_to(path)
    model = ASRModel.restore_from(path, map_location="cpu").eval()
    tensors = {k: v.clone() for k, v in model.state_dict().items() if "prompt_kernel" in k}
    names = [name for name in LANGUAGES if name != "en"]
    mixed = torch.tensor([LANGUAGES[name] for name in ("de-DE", "auto", "en-US")])
    expected = {
        "target": CLASS,
        "model_defaults": OmegaConf.to_container(model.cfg.model_defaults, resolve=True),
        "num_prompts": model.cfg.num_prompts,
        "mixed": mixed.tolist(),
        "contexts": {},
    }
    batch = (golden["audio"], golden["audio_len"], golden["targets"], golden["targets_len"], mixed)
    model.encoder.set_default_att_context_size(list(config.encoder.att_context_size[0]))
    with torch.no_grad():
        encoded, lengths = model(
            input_signal=batch[0], input_signal_length=batch[1], prompt_indices=mixed
        )
    tensors["encoded"] = encoded[0, :, : int(lengths[0])].T.contiguous()  # of de-DE
    model.log_dict = lambda *args, **kwargs: None
    model._optimizer = type("NoOptimizer", (), {"param_groups": [{"lr": 0.0}]})()
    trainer = type("NoTrainer", (), {"log_every_n_steps": 10**9, "global_step": 0})()
    model._trainer = trainer
    with torch.no_grad():
        expected["training_step_eval_mode"] = float(model.training_step(batch, 0)["loss"])
    expected["training"] = trained(path, batch, trainer)
    model._trainer = None
    for context in config.encoder.att_context_size:
        model.encoder.set_default_att_context_size(list(context))
        block = expected["contexts"][str(context[1])] = {}
        for name in names:
            index = torch.full((len(mixed),), LANGUAGES[name])
            with torch.no_grad():
                encoded, lengths = model(
                    input_signal=batch[0], input_signal_length=batch[1], prompt_indices=index
                )
            block[name] = decoded(model, encoded, lengths)
            if context[1]:
                block[name]["stream"] = streamed(model, golden, name)
    model.encoder.set_default_att_context_size(list(config.encoder.att_context_size[0]))
    clips = [a[:n].numpy() for a, n in zip(golden["audio"], golden["audio_len"].tolist())]
    expected["transcribe"] = {}
    for name in names:
        found = model.transcribe(clips, batch_size=3, target_lang=name, verbose=False)
        model.eval()
        expected["transcribe"][name] = [hypothesis.text for hypothesis in found]
    try:
        model.transcribe(clips, batch_size=3, target_lang="xx", verbose=False)
    except ValueError as error:
        expected["unknown_language"] = str(error)
    write(folder / "prompts.json", expected)
    save_file(tensors, folder / "prompts.safetensors")


def trained(path: str, batch: tuple, trainer) -> list[float]:
    """Losses of NeMo's training_step over five AdamW steps, with nothing random in them."""
    model = ASRModel.restore_from(path, map_location="cpu").eval()
    model.encoder.set_default_att_context_size(list(model.cfg.encoder.att_context_size[0]))
    model.log_dict = lambda *args, **kwargs: None
    model._optimizer = type("NoOptimizer", (), {"param_groups": [{"lr": 0.0}]})()
    model._trainer = trainer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def record_eou(folder: Path, golden: dict, temporary: Path):
    expected = {"marks": MARKS, "texts": {}}
    for kind, number in KINDS.items():
        path = temporary / f"{kind}.nemo"
        with tarfile.open(folder / "model.nemo") as before, tarfile.open(path, "w") as after:
            for member in before.getmembers():
                content = before.extractfile(member).read() if member.isfile() else b""
                if member.name.endswith("_tokenizer.model"):
                    pieces = sentencepiece_model_pb2.ModelProto()
                    pieces.ParseFromString(content)
                    for piece in pieces.pieces:
                        if piece.piece in MARKS:
                            piece.piece, piece.type = MARKS[piece.piece], number
                    content = pieces.SerializeToString()
                    member.size = len(content)
                after.addfile(member, io.BytesIO(content))
        model = ASRModel.restore_from(str(path), map_location="cpu").eval()
        with torch.no_grad():
            encoded, lengths = model(
                input_signal=golden["audio"], input_signal_length=golden["audio_len"]
            )
        expected["texts"][kind] = decoded(model, encoded, lengths)
    write(folder / "eou.json", expected)


def decoded(model, encoded, lengths) -> dict:
    rnnt = model.decoding.rnnt_decoder_predictions_tensor(encoded, lengths, return_hypotheses=True)
    with torch.no_grad():
        log_probs = model.ctc_decoder(encoder_output=encoded)
    ctc = model.ctc_decoding.ctc_decoder_predictions_tensor(
        log_probs, lengths, return_hypotheses=True
    )
    return {
        "rnnt": [
            {"text": h.text, "ids": h.y_sequence.tolist(), "timestamp": h.timestamp.tolist()}
            for h in rnnt
        ],
        "ctc": [{"text": h.text} for h in ctc],
    }


def streamed(model, golden: dict, language: str) -> list[list[int]]:
    """Token ids after each step of NeMo's loop, over the first clip alone."""
    model.set_inference_prompt(language)
    buffer = CacheAwareStreamingAudioBuffer(model=model, online_normalization=False)
    buffer.append_audio(golden["audio"][0, : int(golden["audio_len"][0])].numpy(), stream_id=-1)
    channel, time, length = model.encoder.get_initial_cache_state(batch_size=1)
    hypotheses, predictions, steps = None, None, []
    for number, (chunk, chunk_lengths) in enumerate(buffer):
        with torch.inference_mode():
            predictions, _, channel, time, length, hypotheses = model.conformer_stream_step(
                processed_signal=chunk,
                processed_signal_length=chunk_lengths,
                cache_last_channel=channel,
                cache_last_time=time,
                cache_last_channel_len=length,
                keep_all_outputs=buffer.is_buffer_empty(),
                previous_hypotheses=hypotheses,
                previous_pred_out=predictions,
                drop_extra_pre_encoded=model.encoder.streaming_cfg.drop_extra_pre_encoded
                if number
                else 0,
                return_transcription=True,
            )
        steps.append([int(i) for i in hypotheses[0].y_sequence])
    del model._inference_prompt_index
    return steps


def write(path: Path, content: dict):
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")


main(Path(sys.argv[1]))
