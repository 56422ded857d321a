"""The transformer decoder: a cache changes nothing, padding reaches nothing, positions go on."""

import pytest
import torch

from fastconformer.networks.transformer_decoder import (
    Embedding,
    Layers,
    TiedOutput,
    TransformerDecoder,
    TransformerEncoder,
    hide_padding,
    sine_positions,
)

WIDTH, HEADS, INNER, CLASSES = 24, 4, 40, 32


def decoder(learned=False, pre_ln=True, activation="relu", max_length=16):
    torch.manual_seed(0)
    embedding = Embedding(CLASSES, WIDTH, max_length, learned, 0.0)
    sizes = dict(inner=INNER, n_heads=HEADS, activation=activation, pre_ln=pre_ln)
    layers = Layers(2, WIDTH, pre_ln, cross=True, **sizes)
    return TransformerDecoder(embedding, layers).eval()


def batch():
    torch.manual_seed(1)
    states, lengths = torch.randn(3, 9, WIDTH), torch.tensor([9, 4, 0])
    tokens = torch.randint(0, CLASSES, (3, 12))
    return tokens, states, hide_padding(lengths, 9, torch.float32)


@pytest.mark.parametrize("pre_ln", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_steps_with_a_cache_equal_one_pass(pre_ln, activation):
    model, (tokens, states, bias) = decoder(pre_ln=pre_ln, activation=activation), batch()
    with torch.no_grad():
        whole = model(tokens, states, bias)
        caches = model.start(states)
        lengths = torch.tensor([5, 2, 3])  # of prompts; what lies behind them is written over
        positions = torch.arange(5).expand(3, -1)
        first = model.step(tokens[:, :5], positions, 5, bias, caches)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(first[row, :length], whole[row, :length])
        for step in range(7):
            at = (lengths + step)[:, None]
            found = model.step(tokens.gather(1, at), at, int(at.max()) + 1, bias, caches)
            expected = whole[torch.arange(3), at[:, 0]]
            torch.testing.assert_close(found[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_hypotheses_of_a_clip_follow_their_own_tokens():
    model, (tokens, states, bias) = decoder(), batch()
    other = tokens.clone()
    other[:, 6:] = (other[:, 6:] + 1) % CLASSES
    with torch.no_grad():
        caches = model.start(states)
        model.step(tokens[:, :5], torch.arange(5).expand(3, -1), 5, bias, caches)
        for cache in caches:
            cache.reorder(torch.tensor([0, 0, 1, 1, 2, 2]))
        rows = torch.stack((tokens, other), 1).flatten(0, 1)  # two a clip
        for u in range(5, 12):
            at = torch.full((6, 1), u)
            found = model.step(rows[:, u : u + 1], at, u + 1, bias, caches)
        for row, text in enumerate((tokens, other)):
            expected = model(text, states, bias)[:, -1]
            torch.testing.assert_close(found[row::2, 0], expected, atol=1e-5, rtol=1e-5)


def test_padding_reaches_nothing():
    model, (tokens, states, bias) = decoder(), batch()
    with torch.no_grad():
        whole = model(tokens, states, bias)
        changed = tokens.clone()
        changed[1, 6:] = 7
        states = states.clone()
        states[1, 4:] = 100.0
        torch.testing.assert_close(model(changed, states, bias)[1, :6], whole[1, :6])
    assert torch.isfinite(whole).all()  # the last clip has no frame


def test_encoder_between():
    torch.manual_seed(0)
    sizes = dict(inner=INNER, n_heads=HEADS)
    model = TransformerEncoder(1, WIDTH, True, cross=False, **sizes).eval()
    _, states, bias = batch()
    with torch.no_grad():
        alone = model(states[1:2, :4], bias[1:2, ..., :4])
        torch.testing.assert_close(model(states, bias)[1:2, :4], alone)


def test_positions_beyond_the_table():
    _, states, bias = batch()
    tokens = torch.randint(0, CLASSES, (3, 20))
    with torch.no_grad():
        short, long = decoder(max_length=16), decoder(max_length=32)
        long.load_state_dict(
            short.state_dict()
            | {"_embedding.position_embedding.pos_enc": sine_positions(32, WIDTH)}
        )
        torch.testing.assert_close(short(tokens, states, bias), long(tokens, states, bias))
        with pytest.raises(ValueError, match="20 tokens .* learned positions for 16"):
            decoder(learned=True)(tokens, states, bias)


def test_tied_output_is_one_tensor():
    model, output = decoder(), TiedOutput(WIDTH, CLASSES, 0.0)
    output.tie(model._embedding)
    assert output.mlp["layer0"].weight is model._embedding.token_embedding.weight
    assert torch.allclose(output(torch.randn(2, 3, WIDTH)).exp().sum(-1), torch.ones(2, 3))
