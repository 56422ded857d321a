"""NeMo's StatelessTransducerDecoder and HATJoint, beside what NeMo's own modules give
(`tests/golden/record_heads.py`)."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import TESTS, golden
from safetensors import safe_open
from safetensors.torch import load_file

from fastconformer import ASRModel, ModelConfig, load_model
from fastconformer.checkpoint.nemo_archive import read_nemo
from fastconformer.config import JointConfig, LossConfig, PredictionConfig
from fastconformer.decoding import transducer_greedy, transducer_next
from fastconformer.decoding.transducer_beam import transducer_beam
from fastconformer.export.client import check_heads
from fastconformer.heads.transducer import Transducer

FILE = TESTS / "golden" / "heads.safetensors"
RECORDED = load_file(FILE)
with safe_open(FILE, "pt") as file:
    FORMS = json.loads(file.metadata()["forms"])
V, D, H, J = 7, 10, 9, 6


def recorded(form: str) -> dict[str, torch.Tensor]:
    return {k.partition("/")[2]: v for k, v in RECORDED.items() if k.startswith(f"{form}/")}


def head_of(form: str) -> Transducer:
    """The head over its two networks alone."""
    context, normalized, hat = FORMS[form]
    config = SimpleNamespace(
        decoder=PredictionConfig(V, H, context_size=context or None, normalized=normalized),
        joint=JointConfig(V, D, H, J, hat=hat),
        loss=LossConfig(),
        max_symbols=3,
    )
    networks = Transducer.networks(config)
    for part, module in networks.items():
        names = f"weights/{part}."
        weights = {k.removeprefix(names): v for k, v in recorded(form).items() if names in k}
        module.load_state_dict(weights)
    return Transducer(SimpleNamespace(config=config, blank_id=V, training=True, **networks), "rnnt")


@pytest.mark.parametrize("form", FORMS)
def test_outputs_loss_and_gradients_are_nemos(form):
    case, head = recorded(form), head_of(form)
    model = head.model
    predicted = model.decoder(case["targets"])
    assert torch.allclose(predicted, case["predicted"], atol=1e-5)
    log_probs = model.joint(case["encoded"], predicted).log_softmax(-1)
    assert torch.allclose(log_probs, case["log_probs"], atol=1e-5)
    names = ("encoded", "lengths", "targets", "target_lengths")
    report: dict = {}
    loss = head.loss(*(case[name] for name in names), eps=0.0, report=report).mean()
    assert loss.item() == pytest.approx(float(case["loss"]), rel=1e-5)
    assert report["active_share"].tolist() == [1, 1]
    loss.backward()
    for part in ("decoder", "joint"):
        for name, parameter in getattr(model, part).named_parameters():
            gradient = case[f"gradients/{part}.{name}"]
            assert torch.allclose(parameter.grad, gradient, atol=1e-4), name


@pytest.mark.parametrize("form", FORMS)
def test_greedy_tokens_are_nemos_by_every_road(form):
    case, head = recorded(form), head_of(form)
    model, lengths = head.model, case["lengths"]
    parts = model.decoder.eval(), model.joint.eval(), V
    found = transducer_greedy(case["encoded"], lengths, *parts, max_symbols=3)
    beam = transducer_beam(case["encoded"], lengths, *parts, 1, max_symbols=3)
    for i, (greedy, searched) in enumerate(zip(found, beam, strict=True)):
        expected = case[f"tokens{i}"].tolist(), case[f"frames{i}"].tolist()
        assert (greedy.tokens, greedy.frames) == expected
        assert (searched.tokens, searched.frames) == expected
        # in three pieces, with the state carried on
        going, state = [head.first_hypothesis()], None
        for first in range(0, int(lengths[i]), 3):
            piece = case["encoded"][i : i + 1, first : min(first + 3, int(lengths[i]))]
            state = transducer_next(going, piece, [first], state, *parts, max_symbols=3)
        assert (going[0].tokens, going[0].frames) == expected


def changed(part: str, **options) -> dict:
    """The config of a golden TDT or RNNT model with another network."""
    config = copy.deepcopy(read_nemo(golden("rnnt_bpe") / "model.nemo").config)
    config[part] |= options
    return config


NETWORKS = {
    "stateless": ("decoder", "StatelessTransducerDecoder", {"context_size": 2}),
    "hat": ("joint", "HATJoint", {}),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_model_is_saved_read_and_not_exported(kind, tmp_path):
    part, name, options = NETWORKS[kind]
    checkpoint = read_nemo(golden("rnnt_bpe") / "model.nemo")
    config = ModelConfig.from_nemo(changed(part, _target_=f"nemo.{name}", **options))
    torch.manual_seed(0)
    model = ASRModel(config, load_model(golden("rnnt_bpe") / "model.nemo").tokenizer)
    model.tokenizer_files = checkpoint.tokenizer_files
    if kind == "hat":
        model.joint.blank_pred[-2].bias.data -= 5.0  # or blank wins everywhere
    model.eval().save(tmp_path / "saved")
    clip = 0.1 * torch.randn(16000).numpy()
    found = model.transcribe([clip])[0].text
    assert found and load_model(tmp_path / "saved").transcribe([clip])[0].text == found
    assert load_model(tmp_path / "saved", dtype=torch.int8).transcribe([clip])[0].text
    with pytest.raises(ValueError, match=f"clients have .*{name}"):
        check_heads(config)


@pytest.mark.parametrize(
    "part, options, message",
    [
        ("decoder", {"_target_": "a.StatelessTransducerDecoder", "context_size": 0}, "1 to 64"),
        ("decoder", {"context_size": 2}, "decoder.context_size is not a known option"),
        ("decoder", {"normalization_mode": "layer"}, "normalization_mode 'layer' is not supp"),
        ("joint", {"_target_": "a.SampledRNNTJoint"}, "only RNNTJoint and HATJoint are"),
        ("joint", {"_target_": "a.HATJoint", "num_extra_outputs": 5}, "HATJoint has no durations"),
    ],
)
def test_what_is_not_there_is_refused_by_name(part, options, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_nemo(changed(part, **options))
