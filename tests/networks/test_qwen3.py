"""Qwen3 against its formulas in float64, and its cache against no cache."""

import torch

from fastconformer.config.funasr import Qwen3Config
from fastconformer.networks.qwen3 import KeyValueCache, Qwen3

CONFIG = Qwen3Config(50, 24, 40, 2, 6, 2, 10, 1e-6, 1e4, False, 3, 64)


def model():
    torch.manual_seed(0)
    network = Qwen3(CONFIG)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def by_hand(network, embeds):
    """One text (S, D) in float64, position by position and head by head."""
    weights = {name: p.double() for name, p in network.state_dict().items()}

    def norm(x, weight):
        return x / (x.square().mean() + CONFIG.rms_norm_eps).sqrt() * weight

    def turn(x, position):
        half = len(x) // 2
        angle = position * CONFIG.rope_theta ** (-torch.arange(half).double() / half)
        a, b = x[:half], x[half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))

    x = embeds.double()
    for number in range(CONFIG.n_layers):
        of = {n.removeprefix(f"model.layers.{number}."): w for n, w in weights.items()}
        h = torch.stack([norm(row, of["input_layernorm.weight"]) for row in x])
        q = (h @ of["self_attn.q_proj.weight"].T).view(len(x), 6, 10)
        k = (h @ of["self_attn.k_proj.weight"].T).view(len(x), 2, 10)
        v = (h @ of["self_attn.v_proj.weight"].T).view(len(x), 2, 10)
        out = torch.zeros(len(x), 60, dtype=torch.float64)
        for head in range(6):
            for t in range(len(x)):
                query = turn(norm(q[t, head], of["self_attn.q_norm.weight"]), t)
                keys = [
                    turn(norm(k[s, head // 3], of["self_attn.k_norm.weight"]), s)
                    for s in range(t + 1)
                ]
                weight = torch.stack([query @ key for key in keys]).div(10**0.5).softmax(0)
                out[t, 10 * head : 10 * head + 10] = weight @ v[: t + 1, head // 3]
        x = x + out @ of["self_attn.o_proj.weight"].T
        h = torch.stack([norm(row, of["post_attention_layernorm.weight"]) for row in x])
        gate = torch.nn.functional.silu(h @ of["mlp.gate_proj.weight"].T)
        x = x + (gate * (h @ of["mlp.up_proj.weight"].T)) @ of["mlp.down_proj.weight"].T
    x = torch.stack([norm(row, weights["model.norm.weight"]) for row in x])
    return x @ weights["lm_head.weight"].T


def test_logits_are_the_formulas():
    network, embeds = model(), torch.randn(1, 7, 24)
    with torch.no_grad():
        hidden = network(embeds, torch.ones(1, 7, dtype=torch.bool), torch.arange(7)[None])
        found = network.lm_head(hidden)[0]
    torch.testing.assert_close(found.double(), by_hand(network, embeds[0]), rtol=1e-4, atol=1e-4)


def test_piece_by_piece_equals_at_once_under_left_padding():
    network = model()
    valid = torch.tensor([[False] * 3 + [True] * 6, [True] * 9])
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    embeds = torch.randn(2, 9, 24)
    cache = KeyValueCache(CONFIG, 2, 2, embeds)  # grows
    with torch.no_grad():
        at_once = network(embeds, valid, positions)
        pieces = [
            network(embeds[:, a:b], valid[:, :b], positions[:, a:b], cache)
            for a, b in ((0, 4), (4, 5), (5, 9))
        ]
        alone = network(embeds[:1, 3:], valid[:1, 3:], positions[:1, 3:])
    found = torch.cat(pieces, dim=1)
    torch.testing.assert_close(found[valid], at_once[valid], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(at_once[:1, 3:], alone, rtol=1e-4, atol=1e-5)
    assert not torch.isnan(at_once).any()


def test_recomputation_gives_the_same_gradients():
    network, embeds = model(), torch.randn(2, 5, 24)
    grads = []
    for recompute in (False, True):
        network.recompute = recompute
        network.zero_grad()
        network(
            embeds, torch.ones(2, 5, dtype=torch.bool), torch.arange(5).expand(2, -1)
        ).sum().backward()
        grads.append([p.grad.clone() for p in network.model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_tied_embedding_is_one_tensor():
    config = Qwen3Config(50, 24, 40, 1, 6, 2, 10, tie_word_embeddings=True)
    network = Qwen3(config)
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert "lm_head.weight" in network.state_dict()
