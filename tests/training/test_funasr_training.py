"""Training of Fun-ASR-Nano: FunASR's own steps, what moves in which stage, masks, chats, and what
a recipe for other models says that this one has not."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import golden, load_case

from fastconformer import load_model
from fastconformer.checkpoint import read_checkpoint
from fastconformer.funasr import FunASRNano
from fastconformer.text.chat import context_header
from training import finetune
from training.data.batching import Draw
from training.data.sources import load_data
from training.data.utterances import read_utterances
from training.loop.step import update
from training.objective.objective import augmentation, batch_loss, objective_of
from training.optim.ema import EMA, plain_state_dict
from training.optim.optim import build_optimizer, schedule_of, set_learning_rates
from training.recipe.data_sections import AugmentRecipe, DataRecipe, SpecAugmentRecipe
from training.recipe.sections import (
    FreezeRecipe,
    LoraRecipe,
    LossRecipe,
    ModelRecipe,
    OptimRecipe,
    PromptRecipe,
    ScheduleRecipe,
    TrainerRecipe,
)
from training.setup.freeze import train_mode
from training.setup.start import build_model, ready_to_train

CASE = "fun_asr_nano_tiny"
RECIPE = Path(__file__).parents[2] / "recipes" / "telephone_llm.yaml"
PARTS = ("audio_encoder", "audio_adaptor", "llm", "ctc_decoder", "ctc")


def made(loss=None, prompt=None, **model) -> FunASRNano:
    recipe = ModelRecipe(init_from=str(golden(CASE)), **model)
    return build_model(recipe, loss or LossRecipe(), seed=0, prompt=prompt or PromptRecipe())


def whole_batch(model, prompts=None):
    """train.jsonl as one batch; its lines were recorded without a context header."""
    manifest = str(golden(CASE) / "train.jsonl")
    data = DataRecipe(train=(manifest,), pad_to_s=0.0)
    train, _ = load_data(data, AugmentRecipe(), 0, model, ("llm",))
    batch = train.store.batch([Draw(clip, 0, clip, 1.0) for clip in range(4)])
    return batch


class WithoutHeader(FunASRNano):
    """Asks what the line says, and no more: as the golden batch was made."""

    def targets_of(self, batch):
        prompts = [utterance.others["prompt"] for utterance in batch.utterances]
        return {"texts": [utterance.text for utterance in batch.utterances], "prompts": prompts}


@pytest.mark.parametrize("name", ["stage1_encoder_adapt", "config_8k_telephone"])
def test_steps_follow_funasr(name):
    """Losses, rates, gradient norms and what moves, of FunASR's own training step."""
    torch.set_num_threads(1)
    expected = load_case(CASE).expected["train"][name]
    rate = {"sample_rate": 8000, "mel_edges": "stretch"} if expected["fs"] == 8000 else {}
    model = made(**rate)
    model.__class__ = WithoutHeader
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    frozen = [part for part in PARTS if part not in expected["trainable"]]
    objective = objective_of(model, LossRecipe(heads="llm"))
    freezing = ready_to_train(
        model, objective, FreezeRecipe(modules=tuple(frozen)), LoraRecipe(), TrainerRecipe()
    )
    optim = OptimRecipe(
        lr=expected["base_lr"], betas=(0.9, 0.999), weight_decay=expected["weight_decay"]
    )
    optimizer = build_optimizer(model, optim)
    warmup = expected["warmup_steps"] - 1
    schedule = ScheduleRecipe("inverse_sqrt", warmup_steps=warmup, min_lr=0.0)
    lr_at = schedule_of(schedule, optim.lr, 8)
    batch = whole_batch(model)
    for step, loss in enumerate(expected["loss"]):
        train_mode(model, freezing, step)
        model.eval()  # as recorded: dropout off
        optimizer.zero_grad()
        total, _ = batch_loss(model, batch, objective)
        assert float(total.detach()) == pytest.approx(loss, rel=1e-4)
        total.backward()
        assert lr_at(step) == pytest.approx(expected["lr"][step], rel=1e-12)
        set_learning_rates(optimizer, lr_at, step)
        norm = update(optimizer, expected["grad_clip"])
        assert norm == pytest.approx(expected["grad_norm"][step], rel=1e-3)
    changed = [
        key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])
    ]
    counts = {part: sum(key.startswith(f"{part}.") for key in changed) for part in PARTS}
    assert counts == expected["changed_parameters"]  # FunASR's CTC does not move: it has no loss


def test_rates_are_warmuplr_s():
    for name, rates in load_case(CASE).expected["warmuplr"].items():
        lr, warmup = (part.partition("=")[2] for part in name.split())
        schedule = ScheduleRecipe("inverse_sqrt", warmup_steps=int(warmup) - 1, min_lr=0.0)
        lr_at = schedule_of(schedule, float(lr), 20000)
        for step, rate in rates.items():
            assert lr_at(int(step) - 1) == pytest.approx(rate, rel=1e-12)


def test_ctc_is_a_loss_of_the_ctc_branch_and_the_encoder():
    model = made(LossRecipe(ctc_weight=0.3))
    objective = objective_of(model, LossRecipe(ctc_weight=0.3))
    assert objective.heads == ("llm", "ctc")
    batch = whole_batch(model)
    total, parts = batch_loss(model, batch, objective)
    assert float(total) == pytest.approx(float(parts["llm"] + 0.3 * parts["ctc"]), rel=1e-6)
    texts = [utterance.text for utterance in batch.utterances]
    encoded = model.encode(*model.featurize(batch.audio, batch.audio_lengths))
    losses = model.losses(*encoded, texts, heads=("ctc",))["ctc"]
    counts = sum(len(model.ctc_tokenizer.encode(text)) for text in texts)
    assert float(parts["ctc"]) == pytest.approx(float(losses.sum()) / counts, rel=1e-5)
    parts["ctc"].backward()
    moved = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {"audio_encoder", "ctc_decoder", "ctc"}


def test_a_batch_in_pieces_gives_the_loss_of_the_batch():
    from training.objective.objective import make_views, views_loss

    model = made(LossRecipe(ctc_weight=0.5))
    objective = objective_of(model, LossRecipe())
    views = make_views(model, whole_batch(model), objective)
    with torch.no_grad():
        total, _, _ = views_loss(model, views, objective)
        pieces = [views_loss(model, views.rows(torch.tensor(rows)), objective)[0]
                  for rows in ([0], [1, 3], [2])]  # fmt: skip
    assert float(sum(pieces)) == pytest.approx(float(total), rel=1e-5)


def test_training_asks_with_the_context_of_the_line():
    model = made()
    batch = whole_batch(model)
    asked = batch.utterances[1].others["prompt"]
    assert asked == "Speech transcription:"
    prompts = model.targets_of(batch)["prompts"]
    assert prompts[1] == context_header(asked) + asked
    assert "leave it blank.\n\n\n\n" in prompts[1] and "我们会留空。\n\n\n\n" in prompts[0]
    known = dataclasses.replace(
        batch.utterances[0], others={"hotwords": "Steels", "prompt": "问："}
    )
    batch = dataclasses.replace(batch, utterances=(known, *batch.utterances[1:]))
    assert model.targets_of(batch)["prompts"][0].endswith("留空。\n热词列表：Steels\n问：")
    plain = dataclasses.replace(batch.utterances[0], others={})  # a line of a NeMo manifest
    batch = dataclasses.replace(batch, utterances=(plain, *batch.utterances[1:]))
    assert model.targets_of(batch)["prompts"][0] == model.training_prompt()


@pytest.mark.parametrize("drops", [False, True])
def test_frozen_parts_do_not_drop_unless_asked(drops):
    model = made(dropout=0.5)
    objective = objective_of(model, LossRecipe(heads="llm"))
    recipe = FreezeRecipe(modules=("encoder", "llm", "ctc"), dropout=drops)
    freezing = ready_to_train(model, objective, recipe, LoraRecipe(), TrainerRecipe())
    train_mode(model, freezing)
    batch = whole_batch(model)
    losses = {float(batch_loss(model, batch, objective)[0]) for _ in range(3)}
    assert (len(losses) > 1) == drops
    moving = {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert moving == {"audio_adaptor"}


def test_layers_freeze_from_the_bottom():
    model = made()
    objective = objective_of(model, LossRecipe(heads="llm"))
    recipe = FreezeRecipe(encoder_layers=2)
    ready_to_train(model, objective, recipe, LoraRecipe(), TrainerRecipe())
    frozen = {".".join(n.split(".")[:3]) for n, p in model.named_parameters()
              if n.startswith("audio_encoder") and not p.requires_grad}  # fmt: skip
    assert frozen == {"audio_encoder.encoders0.0", "audio_encoder.encoders.0"}


def test_lora_goes_into_the_language_model_and_is_merged():
    model = made()
    lora = LoraRecipe(rank=2, targets=("attention", "feed_forward"))
    objective = objective_of(model, LossRecipe(heads="llm"))
    ready_to_train(model, objective, FreezeRecipe(), lora, TrainerRecipe())
    moving = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(moving) == 2 * 7 * 2 and all(".lora_" in name for name in moving)
    assert all(name.startswith("llm.model.layers.") for name in moving)
    before = plain_state_dict(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.fill_(0.01)
    after = plain_state_dict(model)
    assert before.keys() == after.keys() == made().state_dict().keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 14


def test_averaged_weights_stay_tied():
    model = made()
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.llm.model.embed_tokens.weight.add_(1.0)
    ema.update(model)
    state = plain_state_dict(model, ema)
    assert torch.equal(state["llm.lm_head.weight"], state["llm.model.embed_tokens.weight"])
    assert not torch.equal(state["llm.lm_head.weight"], model.llm.lm_head.weight)


def test_masks_before_stacking_hide_frames_of_10_ms():
    model = made()
    audio, lengths = torch.randn(2, 32000) * 0.1, torch.tensor([32000, 16000])
    torch.manual_seed(0)
    mask = augmentation(SpecAugmentRecipe(time_masks=1, time_width=9, freq_masks=0), {})
    features, rows = model.featurize(audio, lengths)
    masked = model.preprocessor.augmented(features, rows, mask)
    frames = (masked == 0).view(2, 7, 80, -1).all(2)  # (B, 7, T): which frames of a row are hidden
    for clip in range(2):
        inside = frames[clip, :, : rows[clip]]
        hidden = {6 * t + j - 3 for j in range(7) for t in range(inside.shape[1]) if inside[j, t]}
        assert 0 < len(hidden) <= 9 and max(hidden) - min(hidden) == len(hidden) - 1
        # seven neighbours make a row, six lead to the next: a frame that two rows hold is in both
        assert all(inside[j, t] == (6 * t + j - 3 in hidden) for j in range(7) for t in range(1, 4))
    assert torch.equal(masked[1, :, rows[1] :], features[1, :, rows[1] :])


def test_masks_after_stacking_are_funasr_s():
    """Rows of 60 ms, one band in each of the seven frames; upper ends inclusive, so one less."""
    expected = load_case(CASE).expected["specaug"][0]
    model = made()
    low, high = expected["time_mask_width_range"]
    recipe = SpecAugmentRecipe(
        time_masks=expected["num_time_mask"],
        time_width=high - 1,
        freq_masks=expected["num_freq_mask"],
        freq_width=expected["freq_mask_width_range"][1] - 1,
        lfr=True,
    )
    n = 400
    features, rows = torch.ones(n, 560, expected["frames"]), torch.full((n,), expected["frames"])
    torch.manual_seed(1)
    masked = model.preprocessor.augmented(features, rows, augmentation(recipe, {}), rows=recipe.lfr)
    stacked = (masked == 0).view(n, 7, 80, -1)
    assert bool((stacked == stacked[:, :1]).all())
    share = (masked == 0).all(1).float().mean()
    assert share == pytest.approx(expected["mean_share_of_frames_masked"], abs=0.03)
    assert (masked == 0).all(1).sum(1).max() <= expected["max_frames_masked"] + 2
    assert low == 0


def lines_of(tmp_path, *entries):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def chat(content, answer="hello", **others):
    user, said = {"role": "user", "content": content}, {"role": "assistant", "content": answer}
    return {"messages": [user, said], **others}


def test_chat_lines_beside_nemo_s(tmp_path):
    shutil.copy(golden(CASE) / "audio" / "clip_3.wav", tmp_path / "a.wav")
    asked = "问：<|startofspeech|>!a.wav<|endofspeech|>"
    manifest = lines_of(
        tmp_path,
        chat(asked, speech_length=94, hotwords="x"),
        chat(asked),  # its length is the file's
        {"audio_filepath": "a.wav", "duration": 0.95, "text": "hello"},
        chat("no audio"),
        chat("<|startofspeech|>!!<|endofspeech|>"),
        chat("<|startofspeech|>!b.wav<|endofspeech|>"),
        chat(asked, speech_length="long"),
        {"messages": [{"role": "user", "content": asked}]},
        {"messages": [{"role": "system", "content": "Be brief."}, *chat(asked)["messages"]]},
        {"messages": "?"},
    )
    kept, dropped = read_utterances(manifest)
    assert [u.duration_s for u in kept] == pytest.approx([0.94, 0.956, 0.95], abs=1e-3)
    assert kept[0].text == "hello" and kept[0].others == {"hotwords": "x", "prompt": "问："}
    assert kept[2].others == {}
    reasons = ["no_audio_filepath", "no_audio_filepath", "missing_audio", "bad_duration"]
    assert [d.reason for d in dropped] == [*reasons, "bad_chat", "bad_chat", "bad_chat"]
    assert [d.line for d in dropped] == list(range(4, 11))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"loss": LossRecipe(sigma=0.1)}, "loss.sigma is 0.1, which Fun-ASR-Nano does not have"),
        ({"loss": LossRecipe(use_cr_ctc=True)}, "loss.use_cr_ctc is True"),
        ({"loss": LossRecipe(label_smoothing=0.1)}, "loss.label_smoothing is 0.1"),
        ({"tokenizer": "x.model"}, "model.tokenizer is 'x.model'"),
        ({"labels": ("a",)}, "model.labels is"),
        ({"prompt": PromptRecipe({"pnc": {"a": "b"}})}, "prompt.values is"),
        ({"sample_rate": 44100}, "the sample rate is 44100"),
        ({"sample_rate": 7000}, "give a half or a quarter"),
    ],
)
def test_what_is_for_other_models_is_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        made(**recipe)


def test_mel_edges_say_where_filters_lie():
    kept, stretched = (made(sample_rate=8000, mel_edges=edges) for edges in ("keep", "stretch"))
    original = made()
    bins = slice(0, 129)
    empty = kept.preprocessor.filters.sum(1) == 0
    assert torch.equal(empty, original.preprocessor.filters[:, bins].sum(1) == 0)
    assert not (stretched.preprocessor.filters.sum(1) == 0).any()
    again = kept.to_checkpoint().config["frontend_conf"]
    assert again["fs"] == 8000 and again["mel_high_hz"] == 8000
    with pytest.raises(ValueError, match="mel_edges stretch is for Fun-ASR-Nano"):
        build_model(
            ModelRecipe(init_from=str(golden("ctc_bpe") / "model.nemo"), mel_edges="stretch"),
            LossRecipe(),
            seed=0,
        )


@pytest.fixture
def recipe(tmp_path):
    """recipes/telephone_llm.yaml on the tiny model: 8 kHz, line, masks and its two stages; three
    steps each, checkpoints after each."""
    manifest = str(golden(CASE) / "train.jsonl")
    tree = yaml.safe_load(RECIPE.read_text())
    tree["output"] = str(tmp_path / "run")
    tree["model"]["init_from"] = str(golden(CASE))
    tree["data"] |= {"train": [manifest], "validation": {"dev": manifest}, "batch_size": 2}
    tree["optim"]["lr"], tree["schedule"]["warmup_steps"] = 1e-3, 1
    del tree["trainer"]["epochs"]
    tree["trainer"] |= {"max_steps": 3, "threads": 1, "device": "cpu", "val_every_steps": 100,
                        "save_every_steps": 1}  # fmt: skip
    tree["stages"][1] |= {"optim": {"lr": 1e-3}, "trainer": {}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_stages_move_what_they_say(recipe, tmp_path):
    assert finetune.main([str(recipe)]) == 0
    run = tmp_path / "run"
    states = [
        made().state_dict(),
        read_checkpoint(run / "stage_1" / "last").state_dict,
        read_checkpoint(run / "stage_2" / "last").state_dict,
    ]

    def moved(before, after):
        names = [n for n in before if not torch.equal(before[n], after[n])]
        return {name.partition(".")[0] for name in names}

    assert moved(states[0], states[1]) == {"audio_encoder"}
    start = read_checkpoint(run / "stage_1" / "best").state_dict
    assert moved(start, states[2]) == {"audio_encoder", "ctc_decoder", "ctc"}
    model = load_model(run / "model_funasr")
    assert model.heads == ("llm", "ctc") and (run / "report.html").is_file()
    assert (run / "model_funasr" / "Qwen3-0.6B" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_equal(recipe, tmp_path):
    assert finetune.main([str(recipe)]) == 0
    shutil.move(tmp_path / "run", tmp_path / "unbroken")
    command = [sys.executable, "-m", "training.finetune", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wanted = tmp_path / "run" / "stage_2" / "checkpoints" / "step_00000001.pt"
    end = time.monotonic() + 240
    while not wanted.is_file() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert wanted.is_file()
    assert finetune.main([str(recipe)]) == 0
    names = ("stage_1/last", "stage_2/last", "best")
    for name in names:
        before = read_checkpoint(tmp_path / "unbroken" / name).state_dict
        after = read_checkpoint(tmp_path / "run" / name).state_dict
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_the_recipe_of_the_book_runs_to_its_end(tmp_path, monkeypatch):
    case = golden(CASE).resolve()
    (tmp_path / "Fun-ASR-Nano-2512").symlink_to(case)
    (tmp_path / "calls").mkdir()
    (tmp_path / "calls" / "audio").symlink_to(case / "audio")
    for name in ("train.jsonl", "dev.jsonl"):
        shutil.copy(case / "train.jsonl", tmp_path / "calls" / name)
    monkeypatch.chdir(tmp_path)
    changes = ["trainer.device=cpu", "trainer.threads=1", "schedule.warmup_steps=0"]
    text = RECIPE.read_text().replace("trainer: {epochs: 20}", "trainer: {epochs: 1}")
    (tmp_path / "recipe.yaml").write_text(text)
    assert finetune.main(["recipe.yaml", "trainer.epochs=1", *changes]) == 0
    model = load_model("runs/telephone_llm/best")
    assert model.sample_rate == 8000 and "of them empty" in model.preprocessor.description
