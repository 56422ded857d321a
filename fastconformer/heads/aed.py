"""The attention encoder-decoder of NeMo's multi-task models (Canary): one token after the other,
each with an eye on all frames, after a prompt that says what is wanted.

Source: NeMo 3.0.0's EncDecMultiTaskModel; Puvvada et al., arXiv:2406.19674.
"""

import functools
import logging
import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..config import AEDConfig, ModelConfig
from ..decoding import DecodingOptions, Hypothesis, aed_search
from ..losses.smoothed import smoothed_cross_entropy
from ..networks.linear import Linear
from ..networks.transformer_decoder import (
    Embedding,
    Layers,
    TiedOutput,
    TransformerDecoder,
    TransformerEncoder,
    hide_padding,
)
from ..recordings.timestamps import Span
from ..text.prompt import DEFAULTS, Prompt
from ..text.tokenizer import Tokenizer
from ..transfers import sent
from .head import Head

# a word between the frames of its start and end, as tokens
_TIMED_WORD = re.compile(r"<\|(\d+)\|>(.*?)<\|(\d+)\|>")
_TIME = re.compile(r"<\|\d+\|>")

logger = logging.getLogger(__name__)


@functools.cache  # once, however many clips ask for it
def _tell_task(source: str, target: str) -> None:
    logger.warning(
        "source_lang is %s and target_lang %s, but the task stays asr, as in NeMo; to translate "
        "say task=ast",
        *(source, target),
    )


class AED(Head):
    """See the module's docstring."""

    family = "aed"
    reads_frames_in_order = False
    longest_s = 40.0
    overlaps = True
    loss_arguments = ("prompt_lengths", "label_smoothing")
    decode_arguments = ("prompt",)
    refused_options = ()

    # --- its networks ----------------------------------------------------------------------------

    @staticmethod
    def networks(config: ModelConfig) -> dict[str, nn.Module]:
        aed, width = config.aed, config.aed.decoder.hidden_size
        embedding = Embedding(
            aed.vocab_size,
            width,
            aed.max_sequence_length,
            aed.learn_positional_encodings,
            aed.embedding_dropout,
            aed.num_token_types,
        )
        output = TiedOutput(width, aed.vocab_size, aed.head_dropout)
        parts = {}
        if config.encoder.d_out != width:
            parts["encoder_decoder_proj"] = Linear(config.encoder.d_out, width)
        if aed.encoder:
            parts["transf_encoder"] = TransformerEncoder(**_layers(aed.encoder, cross=False))
        decoder = TransformerDecoder(embedding, Layers(**_layers(aed.decoder, cross=True)))
        _initialise((*parts.values(), decoder, output), width)
        output.tie(embedding)
        return parts | {"transf_decoder": decoder, "log_softmax": output}

    @staticmethod
    def n_layers(config: ModelConfig) -> int:
        between = config.aed.encoder
        return config.aed.decoder.num_layers + (between.num_layers if between else 0)

    @staticmethod
    def frame_bytes(config: ModelConfig, itemsize: int) -> int:
        decoder = config.aed.decoder  # keys and values of each layer, and the states
        return (2 * decoder.num_layers + 1) * decoder.hidden_size * itemsize

    @staticmethod
    def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> None:
        rounded = -(-tokenizer.vocab_size // 8) * 8
        if rounded != config.aed.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} pieces, which need {rounded} outputs; "
                f"the head has {config.aed.vocab_size}"
            )

    def tie(self) -> None:
        self.model.log_softmax.tie(self.model.transf_decoder._embedding)

    @property
    def config(self) -> AEDConfig:
        return self.model.config.aed

    @property
    def modules(self) -> dict[str, str]:
        names = {
            "projection": "encoder_decoder_proj",
            "transf_encoder": "transf_encoder",
            "transf_decoder": "transf_decoder",
            "head": "log_softmax",
        }
        return {name: path for name, path in names.items() if hasattr(self.model, path)}

    @property
    def adaptable(self) -> tuple[str, ...]:
        between = ("transf_encoder.layers",) if hasattr(self.model, "transf_encoder") else ()
        return (*between, "transf_decoder._decoder.layers")

    def token_layers(self) -> dict[str, nn.Module]:
        return {
            "transf_decoder._embedding.token_embedding": (
                self.model.transf_decoder._embedding.token_embedding
            ),
            "log_softmax.mlp.layer0": self.model.log_softmax.mlp["layer0"],
        }

    def n_rows(self, path: str, n_tokens: int) -> int:
        return -(-n_tokens // 8) * 8

    def int8_parts(self) -> list[nn.Module]:
        return [getattr(self.model, path) for path in self.modules.values()]

    # --- prompts ---------------------------------------------------------------------------------

    @property
    def prompt(self) -> Prompt:
        """What the model can be told; ValueError: its config holds slots or values that are
        none."""
        config = self.config
        return Prompt(
            config.prompt_format, self.model.tokenizer, config.prompt_defaults, config.prompt_values
        )

    @property
    def slots(self) -> tuple[str, ...]:
        return self.prompt.slots

    @property
    def aligner(self):
        return self.model.aligner

    def slots_of(self, line: Mapping) -> dict:
        # manifests for the first Canary say a task, which later ones are not asked for
        names = (*self.slots, *(("taskname",) if "task" in self.slots else ()))
        return {name: line[name] for name in names if line.get(name) is not None}

    def language_pair(self, slots: Mapping) -> str:
        return ">".join(self.prompt.languages(**self.slots_of(slots)))

    def asked(self, slots: Mapping, timestamps: bool) -> dict:
        """Slots by name, and `prompt`: further ones {slot: value} or the ids themselves, for all
        clips or a list with one for each. Times come by tokens where no aligner gives them."""
        common = {name: value for name, value in slots.items() if value is not None}
        own = common.pop("prompt", None)
        if timestamps and self.aligner is None:
            if "timestamp" not in self.slots:
                raise ValueError(
                    f"timestamps: prompts of format {self.config.prompt_format} have no slot for "
                    "them, and the model holds no CTC model that could align"
                )
            common = {"timestamp": "yes"} | common
        each = not isinstance(own, Mapping) and own is not None and _is_nested(own)
        prompts = [self._ids_for(one, common) for one in (own if each else [own])]
        return {"prompt": prompts if each else prompts[0]}

    def _ids_for(self, own, common: dict) -> list[int]:
        if own is not None and not isinstance(own, Mapping):
            wanted = common.keys() - {"timestamp"}
            if wanted:
                raise ValueError(f"prompt is given as ids, {sorted(wanted)[0]} beside it")
            return _ids(own)
        slots = common | dict(own or {})
        given = {name: value for name, value in slots.items() if value is not None}
        full = DEFAULTS | self.prompt.defaults | given
        source, target = (str(full[f"{end}_lang"]).strip("<|>") for end in ("source", "target"))
        if "task" in self.slots and source != target and not given.keys() & _TASKS:
            _tell_task(source, target)
        return self.prompt.ids(**slots)

    def for_lines(self, lines: Sequence[Mapping]) -> dict:
        return {"prompt": [self.prompt.ids(**self.slots_of(line)) for line in lines]}

    def for_clips(self, arguments: dict, clips: list[int]) -> dict:
        prompts = arguments.get("prompt")
        if prompts is None or not _is_nested(prompts):
            return arguments
        return arguments | {"prompt": [prompts[i] for i in clips]}

    def _prompts(self, prompt, n_clips: int) -> list[list[int]]:
        if prompt is None or isinstance(prompt, Mapping):
            prompt = self.prompt.ids(**(prompt or {}))
        ids = [_ids(one) for one in prompt] if _is_nested(prompt) else [_ids(prompt)] * n_clips
        most = self.config.max_sequence_length
        if len(ids) != n_clips:
            raise ValueError(f"{len(ids)} prompts for {n_clips} clips, expected one for each")
        for one in ids:
            if not one or min(one) < 0 or max(one) >= self.config.vocab_size:
                raise ValueError(
                    f"a prompt is {one}, expected token ids from 0 to {self.config.vocab_size - 1}"
                )
            if len(one) >= most:
                raise ValueError(
                    f"the prompt has {len(one)} tokens, the decoder has {most} positions for it "
                    "and the text; shorten decodercontext"
                )
        return ids

    def decoder_ids(self, line: Mapping) -> tuple[list[int], int]:
        """A manifest line -> prompt + text + end, and how many ids are the prompt's. ValueError:
        the line lacks a key, or is longer than the decoder."""
        prompt = self.prompt
        context = prompt.of_line(line)
        ids = context + prompt.answer_ids(line)
        most = self.config.max_sequence_length
        if len(ids) > most + 1:  # the last one is only a target
            raise ValueError(
                f"{len(ids)} tokens with the prompt, the decoder takes at most {most + 1}"
            )
        return ids, len(context)

    # --- what it says ----------------------------------------------------------------------------

    def states(self, encoded: torch.Tensor, lengths: torch.Tensor):
        """encoded (B, T', D) -> what the decoder attends to (B, T', H), and `hide_padding`'s
        bias."""
        project = getattr(self.model, "encoder_decoder_proj", None)
        states = encoded if project is None else project(encoded)
        bias = hide_padding(lengths, states.shape[1], states.dtype)
        between = getattr(self.model, "transf_encoder", None)
        return (states if between is None else between(states, bias)), bias

    def decoder_log_probs(self, encoded, lengths, decoder_ids: torch.Tensor) -> torch.Tensor:
        """See `ASRModel.aed_log_probs`."""
        if decoder_ids.dim() != 2 or len(decoder_ids) != len(encoded):
            raise ValueError(
                f"decoder_ids are {tuple(decoder_ids.shape)}, expected ({len(encoded)}, U)"
            )
        if decoder_ids.numel():  # padding may be anything
            decoder_ids = decoder_ids.clamp(0, self.config.vocab_size - 1)
        states = self.states(encoded, lengths)
        return self.model.log_softmax(self.model.transf_decoder(decoder_ids, *states))

    def logits(self, encoded: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        lengths = torch.tensor([encoded.shape[1]], device=encoded.device)
        prompt = torch.tensor(self.prompt.ids(), device=tokens.device)
        states = self.states(encoded, lengths)
        hidden = self.model.transf_decoder(torch.cat((prompt, tokens))[None], *states)
        return self.model.log_softmax.logits(hidden)[0]

    @property
    def reduction(self) -> str:
        return "mean_volume"  # over the tokens that count

    def language_of(self, line: Mapping) -> str | None:
        return self.prompt.language_of(line)

    def training_ids(self, line: Mapping) -> tuple[list[int], int]:
        return self.decoder_ids(line)

    def loss_inputs(self, prompt_lengths: torch.Tensor | None) -> dict:
        masked = self.model.config.loss.mask_prompt and prompt_lengths is not None
        return {"prompt_lengths": prompt_lengths} if masked else {}

    def target_counts(self, batch) -> torch.Tensor:
        masked = self.loss_inputs(batch.prompt_lengths)
        return self.counts(batch.targets, batch.target_lengths, **masked).sum(1)

    def counts(self, targets, target_lengths, prompt_lengths=None) -> torch.Tensor:
        """(B, U-1): True for the tokens of targets[:, 1:] that are trained on. Without prompt
        lengths all but padding, as NeMo masks; with them those after the prompt."""
        place = torch.arange(1, targets.shape[1], device=targets.device)
        valid = place < target_lengths[:, None]
        if prompt_lengths is not None:
            return valid & (place >= prompt_lengths[:, None])
        return valid & (targets[:, 1:] != self.model.tokenizer.pad_id)

    def loss(
        self,
        encoded: torch.Tensor,
        encoded_lengths: torch.Tensor,
        targets: torch.Tensor,
        target_lengths: torch.Tensor,
        prompt_lengths: torch.Tensor | None = None,
        label_smoothing: float | None = None,
    ) -> torch.Tensor:
        """Targets are prompt + text + end; the loss sums over the tokens that `counts`."""
        smoothing = self.model.config.loss.label_smoothing
        smoothing = smoothing if label_smoothing is None else label_smoothing
        if not 0 <= smoothing < 1:
            raise ValueError(f"label_smoothing is {smoothing}, expected 0 to below 1")
        device = encoded.device
        encoded_lengths, targets = sent(encoded_lengths, device), sent(targets, device)
        target_lengths = sent(target_lengths, device)
        prompt_lengths = None if prompt_lengths is None else sent(prompt_lengths, device)
        counts = self.counts(targets, target_lengths, prompt_lengths)
        inputs = targets[:, :-1].clamp(0, self.config.vocab_size - 1)
        hidden = self.model.transf_decoder(inputs, *self.states(encoded, encoded_lengths))
        logits = self.model.log_softmax.logits(hidden)
        return smoothed_cross_entropy(logits, targets[:, 1:], counts, smoothing)

    def decode(
        self,
        encoded: torch.Tensor,
        lengths: torch.Tensor,
        options: DecodingOptions,
        prompt=None,
    ) -> list[Hypothesis]:
        """prompt: ids for all clips, a list of ids for each, or slots; None: the model's
        defaults."""
        if not len(encoded):
            return []
        model, config, tokenizer = self.model, self.config, self.model.tokenizer
        prompts = self._prompts(prompt, len(encoded))
        delta = options.max_generation_delta
        delta = config.max_generation_delta if delta is None else delta
        most = [
            config.max_sequence_length if delta < 0 else min(config.max_sequence_length, n + delta)
            for n in lengths.tolist()
        ]
        n_tokens = tokenizer.vocab_size  # the outputs beyond it are padding
        token_bias = options.bias(tokenizer, encoded.device)
        return aed_search(
            *self.states(encoded, lengths),
            prompts,
            [limit + config.one_more for limit in most],
            model.transf_decoder,
            lambda hidden: model.log_softmax(hidden)[..., :n_tokens],
            eos=tokenizer.eos_id,
            pad=tokenizer.pad_id,
            beam=options.beam,
            length_penalty=options.length_penalty,
            max_repeats=options.max_repeats,
            fusion=options.fusion(tokenizer, encoded.device),
            token_bias=None if token_bias is None else token_bias[:n_tokens],
            confidence=options.confidence,
        )

    # --- its text and times ----------------------------------------------------------------------

    def text(self, hypothesis: Hypothesis) -> str:
        """Without time tokens. Where words stand between them, these are the text, and what has
        no pair is dropped, as in NeMo."""
        text = self.model.tokenizer.decode(hypothesis.tokens)
        if not _TIME.search(text):
            return text
        words = [word.text for word in _timed_words(text)]
        return " ".join(words or _TIME.sub(" ", text).split())

    def words(self, hypothesis: Hypothesis, aggregate=min) -> list[Span]:
        return _timed_words(self.model.tokenizer.decode(hypothesis.tokens))


_TASKS = {"task", "taskname"}


def _timed_words(text: str) -> list[Span]:
    """Words between two time tokens, in frames."""
    found = ((word.strip(), int(a), int(b)) for a, word, b in _TIMED_WORD.findall(text))
    return [Span(word, start, end) for word, start, end in found if word]


def _layers(config, cross: bool) -> dict:
    return dict(
        n_layers=config.num_layers,
        width=config.hidden_size,
        final_norm=config.pre_ln and config.pre_ln_final_layer_norm,
        inner=config.inner_size,
        n_heads=config.num_attention_heads,
        cross=cross,
        activation=config.hidden_act,
        pre_ln=config.pre_ln,
        dropouts=(config.attn_score_dropout, config.attn_layer_dropout, config.ffn_dropout),
    )


def _initialise(parts: Sequence[nn.Module], width: int) -> None:
    """Random weights as NeMo's: normal with a deviation of 1 / sqrt(H), biases 0."""
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=width**-0.5)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


def _is_nested(prompt) -> bool:
    """A prompt for each clip, not one for all."""
    return len(prompt) > 0 and not isinstance(prompt[0], int) and getattr(prompt[0], "ndim", 1) > 0


def _ids(prompt) -> list[int]:
    return [int(i) for i in prompt]
