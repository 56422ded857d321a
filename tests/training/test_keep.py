"""Keeping the best: which evaluations stay, the guard, averages, stages, the list of runs."""

import json
import math
import shutil

import pytest
import torch
from conftest import golden, ledger, logged, make_corpus

from fastconformer import load_model
from fastconformer.checkpoint.contents import Checkpoint
from fastconformer.checkpoint.folder import write_folder
from fastconformer.checkpoint.read import read_checkpoint
from training.average import main as average
from training.finetune import main
from training.loop.keep import Kept, check_metric, guard_holds, metrics_of
from training.optim.average import average_checkpoints
from training.recipe.recipe import load_recipe, stage_recipes
from training.recipe.sections import GuardRecipe, KeepRecipe


def record(step, wer, cer=0.5, general=0.2, loss=1.0):
    sets = {
        "calls": {"ctc": {"wer": wer, "cer": cer}},
        "general": {"ctc": {"wer": general, "cer": 0.1}},
    }
    rates = {"ctc": {"wer": wer, "cer": cer}}
    return {"step": step, "head": "ctc", "wer": wer, "cer": cer, "train_loss": loss} | {
        "sets": sets,
        "all": rates,
    }


def steps(kept: Kept) -> list[int]:
    return [step for _, _, step in kept.top]


def test_the_best_k_stay_best_first():
    kept, keep = Kept(), KeepRecipe(top_k=3)
    rates = [0.5, 0.3, 0.4, 0.3, 0.2, 0.9]
    is_best = [kept.consider(record(i, wer), keep, holds=True) for i, wer in enumerate(rates)]
    assert is_best == [True, True, False, False, True, False]
    assert steps(kept) == [4, 1, 3]  # a tie: the earlier one first


def test_all_stay_where_no_number_is_given():
    kept = Kept()
    for step in range(5):
        kept.consider(record(step, 0.5 - 0.1 * step), KeepRecipe(top_k=None, average=True), True)
    assert steps(kept) == [4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match="set top_k to 2 or more"):
        KeepRecipe(average=True)


def test_equal_metrics_are_told_apart_by_cer():
    kept = Kept()
    for step, cer in enumerate([0.5, 0.4, 0.45]):
        kept.consider(record(step, 1.0, cer), KeepRecipe(), holds=True)
    assert steps(kept) == [1]


def test_any_logged_metric():
    first, second = record(1, 0.5, general=0.2, loss=3.0), record(2, 0.4, general=0.3, loss=4.0)
    for metric, best in {"wer": 2, "wer/general/ctc": 1, "train_loss": 1, "wer/all/ctc": 2}.items():
        kept = Kept()
        for entry in (first, second):
            kept.consider(entry, KeepRecipe(metric=metric), holds=True)
        assert steps(kept) == [best], metric
        check_metric(metric, ("calls", "general"), ("ctc",))
        assert metric in metrics_of(first)
    with pytest.raises(ValueError, match="'wer/dev/ctc'; this run logs wer, cer, train_loss"):
        check_metric("wer/dev/ctc", ("calls",), ("ctc",))


def test_the_untouched_model_is_the_worst_by_training_loss():
    kept = Kept()
    untouched = record(0, 0.1) | {"train_loss": None}
    assert kept.consider(untouched, KeepRecipe(metric="train_loss"), holds=True)
    assert kept.top[0][0] == math.inf
    assert kept.consider(record(1, 0.9), KeepRecipe(metric="train_loss"), holds=True)


def test_patience_counts_evaluations_that_are_not_better_by_min_delta():
    keep = KeepRecipe(patience=3, min_delta=0.1)
    kept, reasons = Kept(), []
    for step, wer in enumerate([0.9, 0.85, 0.82, 0.75, 0.74, 0.73, 0.72]):
        kept.consider(record(step, wer), keep, holds=True)
        reasons.append(kept.reason_to_stop(keep, GuardRecipe()))
    # 0.85 and 0.82 are not better than 0.9 by 0.1, 0.75 is; then three that are not
    assert [bool(reason) for reason in reasons] == [False] * 6 + [True]
    assert "has not become better for 3 evaluations" in reasons[-1]
    assert steps(kept) == [6]  # the best is the best all the same


@pytest.mark.parametrize(
    ("guard", "general", "holds"),
    [
        (GuardRecipe("general", 0.02), 0.22, True),
        (GuardRecipe("general", 0.02), 0.221, False),
        (GuardRecipe("general", 0.1, relative=True), 0.22, True),
        (GuardRecipe("general", 0.1, relative=True), 0.221, False),
        (GuardRecipe(), 9.0, True),
    ],
)
def test_the_guard_compares_with_the_untouched_model(guard, general, holds):
    assert guard_holds(record(5, 0.1, general=general), record(0, 0.5), guard) is holds


def test_what_forgets_is_never_the_best():
    kept, guard = Kept(), GuardRecipe("general", stop_after=2)
    untouched = record(0, 0.5)
    for step, (wer, general) in enumerate([(0.5, 0.2), (0.3, 0.2), (0.1, 0.4), (0.1, 0.5)]):
        entry = record(step, wer, general=general)
        kept.consider(entry, KeepRecipe(top_k=9), guard_holds(entry, untouched, guard))
    assert steps(kept) == [1, 0]
    assert "general was beyond its limit for 2" in kept.reason_to_stop(KeepRecipe(), guard)


# --- averages -----------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    """Three folders of one model with other weights, and the first's tensors."""
    checkpoint = read_checkpoint(golden("train_parity") / "model.nemo")
    folders = []
    for number in range(3):
        torch.manual_seed(number)
        state = {
            name: tensor + number
            if not tensor.is_floating_point()
            else tensor + torch.randn_like(tensor)
            for name, tensor in checkpoint.state_dict.items()
        }
        folders.append(tmp_path / f"m{number}")
        write_folder(folders[-1], Checkpoint(checkpoint.config, state, checkpoint.tokenizer_files))
    return folders


def test_an_average_is_the_mean_of_weights_and_statistics(three, tmp_path, capsys):
    assert average([*map(str, three), "-o", str(tmp_path / "mean")]) == 0
    states = [read_checkpoint(folder).state_dict for folder in three]
    mean = read_checkpoint(tmp_path / "mean").state_dict
    for name, tensor in mean.items():
        assert tensor.dtype == states[0][name].dtype
        if tensor.is_floating_point():
            expected = torch.stack([state[name].double() for state in states]).mean(0)
            torch.testing.assert_close(tensor, expected.to(tensor.dtype), rtol=0, atol=0, msg=name)
        else:
            assert torch.equal(tensor, states[2][name]), name  # the highest counter
    name = "encoder.layers.0.conv.batch_norm.running_mean"
    assert not torch.equal(mean[name], states[0][name])
    assert load_model(tmp_path / "mean").heads == ("tdt", "ctc")


@pytest.mark.parametrize("option", ["trainer.ema_decay=0.5", "lora.rank=2"])
def test_a_runs_checkpoint_gives_what_the_run_would_save(corpus, tmp_path, option):
    recipe, run = corpus
    assert main([str(recipe), option, "trainer.max_steps=2", "data.validation={}"]) == 0
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert average([str(checkpoint), "-o", str(tmp_path / "mean")]) == 0
    mean, last = (load_model(path).state_dict() for path in (tmp_path / "mean", run / "last"))
    assert all(torch.equal(mean[name], value) for name, value in last.items())


def test_averages_of_different_models_are_refused(three, tmp_path, capsys):
    checkpoint = read_checkpoint(three[1])
    weight = "joint.enc.weight"
    state = checkpoint.state_dict | {weight: checkpoint.state_dict[weight][:3].clone()}
    changed = Checkpoint(checkpoint.config, state, checkpoint.tokenizer_files)
    write_folder(tmp_path / "other", changed)
    command = [str(three[0]), str(tmp_path / "other"), "-o", str(tmp_path / "mean")]
    assert average(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f"{weight} is (" in error and error.count("\n") == 1
    assert not (tmp_path / "mean").exists()
    assert average([str(three[0]), str(tmp_path / "gone.pt"), "-o", str(tmp_path / "mean")]) == 1
    assert "gone.pt is not a file" in capsys.readouterr().err


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run that has learned one clip by heart: (folder with recipe.yaml, run folder)."""
    folder = tmp_path_factory.mktemp("learned")
    recipe, run = make_corpus(folder)
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "one.jsonl").write_text(lines[0])
    (folder / "others.jsonl").write_text(lines[4] + lines[6])
    options = [
        f"data.train={folder / 'one.jsonl'}",
        f"data.validation={{one: {folder / 'one.jsonl'}}}",
        "trainer.max_steps=60",
        "trainer.val_every_steps=10",
        "loss.heads=ctc",
        "optim.lr=5e-3",
        "keep.top_k=3",
        "keep.average=true",
    ]
    assert main([str(recipe), *options]) == 0
    return folder, run


def test_a_run_keeps_its_best_and_their_average_if_it_is_better(learned):
    folder, run = learned
    *evaluations, last = ledger(run)
    assert [entry["step"] for entry in evaluations] == [0, 10, 20, 30, 40, 50, 60]
    order = sorted(evaluations, key=lambda entry: (entry["wer"], entry["cer"], entry["step"]))
    best = [entry["step"] for entry in order[:3]]
    assert order[0]["wer"] == 0.0
    assert {path.name for path in (run / "top").iterdir()} == {f"step_{n:08d}" for n in best}
    assert last["average_of"] == best
    expected = average_checkpoints([run / "top" / f"step_{n:08d}" for n in best]).state_dict
    found = read_checkpoint(run / "average").state_dict
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    wins = (last["wer"], last["cer"]) < (order[0]["wer"], order[0]["cer"])
    source = run / "average" if wins else run / "top" / f"step_{best[0]:08d}"
    kept = read_checkpoint(run / "best").state_dict
    assert all(torch.equal(kept[n], v) for n, v in read_checkpoint(source).state_dict.items())
    [line] = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert line["status"] == "done" and line["steps"] == 60 and line["best"]["wer"] == 0.0
    assert line["before"]["wer"] == 1.0 and line["output"] == str(run)


def test_a_checkpoint_can_be_averaged(learned, tmp_path):
    _, run = learned
    (newest, *_) = sorted((run / "checkpoints").iterdir(), reverse=True)
    assert average([str(newest), str(run / "last"), "-o", str(tmp_path / "mean")]) == 0
    last = load_model(run / "last").state_dict()
    mean = load_model(tmp_path / "mean").state_dict()
    assert all(torch.equal(mean[name], value) for name, value in last.items())


def test_the_guard_stops_a_run_that_forgets(learned, tmp_path):
    folder, run = learned
    options = [
        f"output={tmp_path / 'guarded'}",
        f"model.init_from={run / 'best'}",
        f"data.train={folder / 'others.jsonl'}",
        f"data.validation={{one: {folder / 'one.jsonl'}, others: {folder / 'others.jsonl'}}}",
        "trainer.max_steps=200",
        "trainer.val_every_steps=5",
        "loss.heads=ctc",
        "optim.lr=5e-3",
        "keep.metric=cer/others/ctc",
        "guard.set=one",
        "guard.limit=0.1",
        "guard.stop_after=2",
    ]
    assert main([str(folder / "recipe.yaml"), *options]) == 0
    entries = ledger(tmp_path / "guarded")
    wer = [entry["sets"]["one"]["ctc"]["wer"] for entry in entries]
    assert wer[0] == 0.0 and wer[-2:] == [1.0, 1.0] and entries[-1]["step"] < 200
    assert [entry["guard_holds"] for entry in entries] == [rate <= 0.1 for rate in wer]
    losses = [entry["loss"] for entry in logged(tmp_path / "guarded")]
    assert losses[-1] < 0.5 * losses[0]  # what it was trained on had become better
    clip = str(folder / "clip0.wav")
    best, last = (load_model(tmp_path / "guarded" / name) for name in ("best", "last"))
    assert (
        best.transcribe(clip, head="ctc")[0].text
        == "good"
        != last.transcribe(clip, head="ctc")[0].text
    )
    [line] = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert line["ended"] == "one was beyond its limit for 2 evaluations"
    # it has ended: the same command does not go on
    assert main([str(folder / "recipe.yaml"), *options]) == 0
    assert ledger(tmp_path / "guarded") == entries


def test_patience_ends_a_run(corpus):
    recipe, run = corpus
    options = ["trainer.max_steps=50", "trainer.val_every_steps=1", "keep.patience=2"]
    assert main([str(recipe), *options, "keep.min_delta=9"]) == 0
    assert [entry["step"] for entry in ledger(run)] == [0, 1, 2] and len(logged(run)) == 2


@pytest.fixture
def staged(corpus):
    recipe, run = corpus
    stages = [
        {"trainer": {"max_steps": 3, "val_every_steps": 3}, "freeze": {"modules": ["encoder"]}},
        {"trainer": {"epochs": 1}, "optim": {"lr": 5e-4}, "loss": {"heads": "ctc"}},
    ]
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"stages": stages}))
    return recipe, run


def test_stages_are_recipes_of_their_own(staged):
    recipe, run = staged
    first, second = stage_recipes(load_recipe(recipe))
    assert first.output == f"{run}/stage_1" and first.freeze.modules == ("encoder",)
    assert second.model.init_from == f"{run}/stage_1/best" and second.freeze.modules == ()
    assert second.trainer.epochs == 1 and second.trainer.max_steps is None
    assert second.optim.lr == 5e-4 and first.optim.lr == 1e-3 and not second.stages
    text = recipe.read_text()
    recipe.write_text(text.replace('"epochs"', '"epoks"'))
    with pytest.raises(ValueError, match="stage 2: unknown key trainer.epoks; did you mean"):
        load_recipe(recipe)
    recipe.write_text(text.replace('{"trainer": {"epochs"', '{"output": "x", "trainer": {"epochs"'))
    with pytest.raises(ValueError, match="stage 2: output belongs to the whole recipe"):
        load_recipe(recipe)


def test_stages_run_one_after_the_other_and_resume(staged):
    recipe, run = staged
    assert main([str(recipe)]) == 0
    ends = [entry["stage"] for entry in ledger(run)]
    assert ends == [1, 1, 2, 2]
    base = load_model(golden("train_parity") / "model.nemo").state_dict()
    first, second = (load_model(run / f"stage_{n}" / "last").state_dict() for n in (1, 2))
    encoder = [name for name in base if name.startswith("encoder.") and name in base]
    assert all(torch.equal(first[name], base[name]) for name in encoder)
    assert any(not torch.equal(second[name], base[name]) for name in encoder)
    best = load_model(run / "best").state_dict()
    assert all(
        torch.equal(best[n], v) for n, v in load_model(run / "stage_2/best").state_dict().items()
    )
    assert (run / "model.nemo").read_bytes()
    runs = [json.loads(line) for line in (run.parent / "runs.jsonl").read_text().splitlines()]
    assert [line["output"] for line in runs] == [str(run)]
    inner = [json.loads(line) for line in (run / "runs.jsonl").read_text().splitlines()]
    assert [line["output"] for line in inner] == [f"{run}/stage_1", f"{run}/stage_2"]
    # stopped in stage 2: only that one is run again, from where it began, to the same end
    weights = (run / "stage_2/last/model.safetensors").read_bytes()
    shutil.rmtree(run / "stage_2")
    log = (run / "stage_1/log.jsonl").read_text()
    assert main([str(recipe)]) == 0
    assert (run / "stage_2/last/model.safetensors").read_bytes() == weights
    assert (run / "stage_1/log.jsonl").read_text() == log
