"""An attention decoder's parts as modules to trace: what it attends to, and its next step.

The caches go in and out as one tensor, as onnx-asr hands them on: keys and values of each layer's
self-attention, (2 layers, B, tokens so far, H).
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..heads.aed import AED
from ..model import ASRModel
from ..networks.transformer_decoder import HIDDEN
from .attention import traceable
from .graphs import Graph, features_example


class AEDEncoder(nn.Module):
    """Features (B, M, T) to states (B, T', H) and their mask (B, T'), 1 where valid."""

    def __init__(self, model: ASRModel, head: AED):
        super().__init__()
        self.encoder, self.head = traceable(model.encoder), head
        # what `head.states` uses must be a part of what is traced
        self.between = nn.ModuleList(model.get_submodule(path) for path in head.modules.values())

    def forward(self, audio_signal: torch.Tensor, length: torch.Tensor):
        encoded, lengths = self.encoder(audio_signal, length)
        states, _ = self.head.states(encoded, lengths)
        valid = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
        return states, valid.long()


class AEDDecoder(nn.Module):
    """Tokens behind those of the caches to log-probabilities of the next one (B, 1, V).

    onnx-asr begins its prompt with "▁", as models of one SentencePiece model do. Where a model's
    own prompt has none, the first token of the first call is left out here.
    """

    def __init__(self, model: ASRModel):
        super().__init__()
        prompt = model.tokenizer.ids_to_pieces(model.head("aed").prompt.ids())
        self.leaves_out_first = prompt[0] != "▁"
        self.decoder, self.output = model.transf_decoder, model.log_softmax
        self.n_tokens = model.tokenizer.vocab_size  # the outputs beyond it are padding

    def forward(self, input_ids, encoder_embeddings, encoder_mask, decoder_mems):
        embedding, past = self.decoder._embedding, decoder_mems.shape[2]
        if self.leaves_out_first:
            first = torch.clamp(1 - torch.as_tensor(past), min=0)  # 1 while the caches are empty
            places = torch.arange(input_ids.shape[1], device=input_ids.device)[first:]
            input_ids = input_ids.index_select(1, places)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) + past
        table = embedding.position_embedding
        table = table.weight if isinstance(table, nn.Embedding) else table.pos_enc
        x = embedding.token_embedding(input_ids) + F.embedding(positions, table)
        x = embedding.layer_norm(x)
        bias = ((1 - encoder_mask) * HIDDEN).to(x.dtype)[:, None, None]
        slots = torch.arange(past + input_ids.shape[1], device=input_ids.device)
        own_bias = ((slots > positions[:, None]) * HIDDEN).to(x.dtype)[None, None]
        kept = []
        for i, layer in enumerate(self.decoder._decoder.layers):

            def attend_self(x, block=layer.first_sub_layer, i=i):
                keys = torch.cat((decoder_mems[2 * i], block.key_net(x)), 1)
                values = torch.cat((decoder_mems[2 * i + 1], block.value_net(x)), 1)
                kept.extend((keys, values))
                return block(x, block._split(keys), block._split(values), own_bias)

            def attend_states(x, block=layer.second_sub_layer):
                return block(x, *block.keys_values(encoder_embeddings), bias)

            x = layer(x, attend_self, attend_states)
        log_probs = self.output(self.decoder._decoder.finish(x)[:, -1:])
        return log_probs[..., : self.n_tokens], torch.stack(kept)


def aed_encoder_graph(model: ASRModel) -> Graph:
    """audio_signal (B, M, T), length (B,) int64 -> encoder_embeddings (B, T', H), encoder_mask
    (B, T') int64."""
    inputs = {"audio_signal": {0: "batch", 2: "frames"}, "length": {0: "batch"}}
    axes = {0: "batch", 1: "encoded"}
    outputs = {"encoder_embeddings": axes, "encoder_mask": axes}
    module = AEDEncoder(model, model.head("aed"))
    names = tuple(inputs), tuple(outputs)
    return Graph(module, features_example(model), *names, inputs | outputs)


def aed_decoder_graph(model: ASRModel) -> Graph:
    """input_ids (B, U), encoder_embeddings, encoder_mask, decoder_mems (2 layers, B, past, H) ->
    logits (B, 1, V), decoder_hidden_states (2 layers, B, past + U, H)."""
    decoder = model.config.aed.decoder
    states = torch.randn(2, 7, decoder.hidden_size)
    mems = torch.randn(2 * decoder.num_layers, 2, 3, decoder.hidden_size)
    mask = torch.ones(2, 7, dtype=torch.long)
    example = torch.ones(2, 4, dtype=torch.long), states, mask, mems
    axes = {0: "batch", 1: "encoded"}
    inputs = {
        "input_ids": {0: "batch", 1: "tokens"},
        "encoder_embeddings": axes,
        "encoder_mask": axes,
        "decoder_mems": {1: "batch", 2: "past"},
    }
    outputs = {"logits": {0: "batch"}, "decoder_hidden_states": {1: "batch", 2: "all"}}
    return Graph(AEDDecoder(model), example, tuple(inputs), tuple(outputs), inputs | outputs)
