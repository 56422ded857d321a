"""Options as published and older checkpoints write them; what is refused, and by which name."""

import copy
import re

import pytest
import torch
from conftest import golden, load_case

from fastconformer.checkpoint.nemo_archive import read_nemo
from fastconformer.config import ModelConfig
from fastconformer.load import check_state_dict
from fastconformer.model import ASRModel
from fastconformer.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def nemo():
    return read_nemo(golden("hybrid_tdt_ctc_bpe") / "model.nemo").config


def changed(config: dict, **sections) -> dict:
    config = copy.deepcopy(config)
    for section, options in sections.items():
        config[section] |= options
    return config


def test_a_unified_parakeet_is_one_of_full_attention(nemo):
    """Keys of parakeet-unified-en-0.6b. Outside of streaming NeMo 3.0 does not look at them."""
    unified = changed(
        nemo,
        encoder={
            "att_context_size": [-1, -1],
            "att_chunk_context_size": [[70], [1, 2, 7, 13], [0, 1, 2, 3, 4, 7, 13]],
            "att_context_style": "chunked_limited_with_rc",
            "conv_context_style": "dcc",
        },
        loss={"offline_loss_weight": 0.3, "streaming_loss_weight": 0.7},
    )
    case = load_case("hybrid_tdt_ctc_bpe")
    checkpoint = read_nemo(case.folder / "model.nemo")
    tokenizer = type("Tokenizer", (), {"vocab_size": 1024})
    model = ASRModel(ModelConfig.from_nemo(unified), tokenizer).eval()
    model.load_state_dict(checkpoint.state_dict)
    with torch.no_grad():
        encoded, lengths = model.encode(case.tensors["features"], case.tensors["features_len"])
    limit = case.expected["suggested_tolerance"]["encoded"]
    for row, expected, n in zip(encoded, case.tensors["encoded"], lengths.tolist()):
        assert (row[:n] - expected[:n]).abs().max() <= limit


@pytest.mark.parametrize(
    "greedy, expected",
    [
        ({"max_symbols": 7}, 7),
        ({"max_symbols_per_step": 7}, 7),
        ({"max_symbols": None, "max_symbols_per_step": 7}, 7),
        ({"max_symbols": None}, None),
        ({}, 10),
    ],
)
def test_max_symbols_by_either_name(nemo, greedy, expected):
    config = changed(nemo, decoding={"greedy": greedy})
    assert ModelConfig.from_nemo(config).max_symbols == expected


@pytest.mark.parametrize(
    "times, expected_s",
    [
        ({"window_stride": 0.01}, 0.08),  # NeMo's times; the hop is 220 samples, 9.977 ms
        ({"window_stride": None, "n_window_stride": 220}, 8 * 220 / 22050),
    ],
)
def test_frames_last_what_nemo_counts(nemo, times, expected_s):
    config = changed(nemo, preprocessor=times | {"sample_rate": 22050, "n_fft": 1024})
    assert ModelConfig.from_nemo(config).frame_seconds == pytest.approx(expected_s, rel=1e-12)


def test_the_letters_are_the_heads_own():
    """NeMo's change_vocabulary leaves the letters of before in `labels`."""
    old, new = ["a", "b", " "], ["б", "а", " "]
    ctc = {"labels": old, "decoder": {"vocabulary": new}}
    rnnt = {"labels": old, "decoder": {}, "joint": {"vocabulary": new}}
    for config in (ctc, rnnt):
        assert load_tokenizer(config, {}).decode([1, 0, 2, 1]) == "аб а"
    assert load_tokenizer({"labels": old, "decoder": {}}, {}).pieces == old


def test_a_hybrids_ctc_reduction_stands_in_its_own_section(nemo):
    config = changed(nemo, aux_ctc={"ctc_reduction": None}) | {"ctc_reduction": "mean_volume"}
    assert ModelConfig.from_nemo(config).loss.ctc_reduction == "mean_batch"


@pytest.mark.parametrize(
    "section, options",
    [
        ("encoder", {"self_attention_model": "abs_pos"}),
        ("encoder", {"subsampling": "vggnet"}),
        ("encoder", {"subsampling": "stacking"}),
        ("encoder", {"subsampling_factor": 1}),
        ("encoder", {"conv_norm_type": "fused_batch_norm"}),
        ("encoder", {"conv_context_style": "other"}),
        ("encoder", {"reduction": "other"}),
        ("encoder", {"reduction_factor": 3}),
        ("encoder", {"reduction_position": 99}),
        ("encoder", {"invented": 1}),
        ("encoder", {"stochastic_depth_drop_prob": 1.0}),
        ("encoder", {"stochastic_depth_drop_prob": -0.1}),
        ("encoder", {"stochastic_depth_start_layer": 0}),
        ("encoder", {"stochastic_depth_start_layer": 99}),
        ("preprocessor", {"pad_to": "max"}),
        ("preprocessor", {"nb_augmentation_prob": 0.5}),
        ("joint", {"num_extra_outputs": 3}),
        ("decoder", {"normalization_mode": "layer"}),
        ("loss", {"loss_name": "multiblank_rnnt"}),
    ],
)
def test_what_is_not_supported_is_refused_by_name(nemo, section, options):
    (key,) = options
    if key.startswith("reduction"):
        options = {
            "reduction": "striding",
            "reduction_factor": 2,
            "reduction_position": 0,
        } | options
    with pytest.raises(ValueError, match=key.strip("_")) as caught:
        ModelConfig.from_nemo(changed(nemo, **{section: options}))
    assert section in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "option", "value", "words"),
    [
        ("encoder", "n_layers", "two", "encoder.n_layers is 'two', expected int"),
        ("encoder", "n_layers", 10**6, "the config has 1000001 layers"),
        ("encoder", "n_layers", None, "fits nothing"),
        ("encoder", "n_heads", 0, "fits nothing"),
        ("encoder", "d_model", 10**9, "fits nothing"),
        ("preprocessor", "n_fft", 1 << 40, "an n_fft of 1099511627776"),
        ("decoder", "prednet", 3, "fits nothing"),
        ("decoding", "greedy", {"max_symbols": -1}, "max_symbols is -1, expected at least 1"),
    ],
)
def test_values_of_no_sense_are_errors_at_once(section, option, value, words):
    """An untrusted config costs neither time nor memory, and no other exception."""
    checkpoint = read_nemo(golden("hybrid_tdt_ctc_bpe") / "model.nemo")
    config = changed(checkpoint.config, **{section: {option: value}})
    with pytest.raises(ValueError, match=re.escape(words)):
        check_state_dict(ModelConfig.from_nemo(config), checkpoint.state_dict)
