"""What a model asks its output heads, and the answers that most heads give."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ..config import ModelConfig
from ..decoding import DecodingOptions, Hypothesis
from ..losses.checks import check_batch, check_targets
from ..recordings.timestamps import Span, spans_of_tokens, word_spans
from ..text.tokenizer import Tokenizer

ENCODE_ARGUMENTS = ("prompt_indices",)  # of `asked`'s answer


class Head:
    """One head of a model, for as long as the caller asks it something: `model.head(name)` makes it
    anew each time. The weights are the model's; a head keeps nothing. See the package's docstring
    for all that a head answers."""

    family = ""  # what recipes call it and its like
    has_frame_posteriors = False
    has_lattice = False
    tokens_share = (
        False  # the probability that blank leaves, so that more tokens leave less to each
    )
    can_stall = False
    reads_frames_in_order = True
    longest_s: float | None = None
    overlaps = False  # its pieces share a second, and are joined where their tokens agree
    needs_frame_per_token = False
    bounds_tokens_per_frame = False
    loss_arguments: tuple[str, ...] = ()
    decode_arguments: tuple[str, ...] = ()
    refused_options: tuple[str, ...] = ("length_penalty", "max_generation_delta", "max_repeats")
    prompt = None
    aligner = None  # a model with a CTC head that times this head's words

    def __init__(self, model, name: str):
        self.model, self.name = model, name

    # --- of a config, before there is a model ---------------------------------------------------

    @staticmethod
    def networks(config: ModelConfig) -> dict[str, nn.Module]:
        """The head's modules with random weights, by the attribute names that NeMo gives them."""
        raise NotImplementedError

    @staticmethod
    def n_layers(config: ModelConfig) -> int:
        """Layers that the config asks for: a checkpoint has at least a tensor for each."""
        return 0

    @staticmethod
    def frame_bytes(config: ModelConfig, itemsize: int) -> int:
        """What decoding holds of each encoder frame, beside the frame itself."""
        return 0

    @staticmethod
    def fit(networks: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
        """Changes the model's modules, which have no memory yet, to what only the tensors of a
        checkpoint say about them."""

    @staticmethod
    def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> None:
        """Raises ValueError unless the head has an output for each of the tokenizer's pieces."""
        if tokenizer.vocab_size != config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} pieces, the heads {config.vocab_size}"
            )

    @property
    def tokenizer(self) -> Tokenizer:
        """What its ids stand for."""
        return self.model.tokenizer

    # --- of its weights --------------------------------------------------------------------------

    @property
    def modules(self) -> dict[str, str]:
        """{name of a part in recipes: path of its module}, of all modules that are the head's."""
        return {}

    @property
    def adaptable(self) -> tuple[str, ...]:
        """Paths of the lists of its layers whose matrices may get low-rank adapters."""
        return ()

    def token_layers(self) -> dict[str, nn.Module]:
        """{path: layer} of the layers with one row for each token, the tokens' rows first: an
        embedding, or layers whose outputs are tokens, blank and whatever else."""
        return {}

    def n_rows(self, path: str, n_tokens: int) -> int | None:
        """Rows that one of `token_layers` has for so many tokens, where what lies behind the
        tokens' is padding; None: it is blank and the like."""
        return None

    @property
    def blank_competes(self) -> bool:
        """Whether blank is an output of `output_layer`, behind the tokens'."""
        return self.n_rows("", 1) is None

    def output_layer(self) -> nn.Module:
        """The one of `token_layers` whose outputs are the logits that decoding compares."""
        return list(self.token_layers().values())[-1]

    def logits(self, encoded: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """encoded (1, T', D), tokens (U,) -> (n, outputs): of every frame, and where the head reads
        tokens of every frame after every prefix of them."""
        raise NotImplementedError

    def int8_parts(self) -> list[nn.Module]:
        """Modules whose matrix products an int8 model computes in 8 bits."""
        return []

    def tie(self) -> None:
        """Makes parameters that are one again one, after each came from a checkpoint by itself."""

    # --- in training -----------------------------------------------------------------------------

    @property
    def reduction(self) -> str:
        """How the losses of a batch's clips become one: mean_batch, mean, mean_volume or sum."""
        return "mean_batch"

    @property
    def share(self) -> float:
        """Of the total loss, where other heads are trained beside it."""
        return 1.0

    def target_counts(self, batch) -> torch.Tensor:
        """Tokens that count in each clip's loss, (B,), of a batch of training."""
        return batch.target_lengths

    def check(self, encoded, encoded_lengths, targets, target_lengths) -> None:
        """Raises ValueError unless these shapes, lengths and targets are what `loss` takes."""
        batch, n_frames = encoded.shape[:2]
        lengths = targets, encoded_lengths, target_lengths
        given = f"encoded is {tuple(encoded.shape)}"
        check_batch(given, batch, n_frames, targets.shape[-1] + 1, *lengths)
        blank = self.model.blank_id
        check_targets(targets, target_lengths, blank + 1, blank)

    def loss(
        self,
        encoded: torch.Tensor,
        encoded_lengths: torch.Tensor,
        targets: torch.Tensor,
        target_lengths: torch.Tensor,
    ) -> torch.Tensor:
        """Negative log-likelihood of each clip in nats, (B,), of a batch that passed `check`. A
        head that takes more names it in `loss_arguments`."""
        raise NotImplementedError

    def language_of(self, line: Mapping) -> str | None:
        """In which a training line's text is written, for the tokenizer; None: not said."""
        return line.get("lang")

    def training_ids(self, line: Mapping) -> tuple[list[int], int]:
        """A manifest line -> the targets of `loss`, and how many of them are a prompt's.
        ValueError: the line lacks what the head needs, or is too long for it."""
        return self.tokenizer.of_language(self.language_of(line)).encode(line["text"]), 0

    def encoder_slots(self, line: Mapping) -> dict:
        """The slots that a training line says to the encoder; none of its language: {}. ValueError:
        one that the model does not know, where transcription would leave it unsaid."""
        prompts = self.model.config.prompts
        if prompts is None:
            return {}
        said = line.get("target_lang") or line.get("lang")
        slots = {} if said is None else {"target_lang": said}
        prompts.index(slots)
        return slots

    def loss_inputs(self, prompt_lengths: torch.Tensor | None) -> dict:
        """Of `loss_arguments` those that a batch of training lines brings, as the config says;
        prompt_lengths: (B,) what `training_ids` counted."""
        return {}

    # --- in decoding -----------------------------------------------------------------------------

    def decode(
        self, encoded: torch.Tensor, lengths: torch.Tensor, options: DecodingOptions
    ) -> list[Hypothesis]:
        """encoded (B, T', D), lengths (B,) -> what the head finds in each clip. A head that takes
        more names it in `decode_arguments`."""
        raise NotImplementedError

    @property
    def slots(self) -> tuple[str, ...]:
        """Of its prompt, by name: what `asked` takes."""
        return () if self.model.config.prompts is None else ("target_lang",)

    def for_clips(self, arguments: dict, clips: list[int]) -> dict:
        """Of `asked`'s arguments, which may differ by clip, those of some of the clips."""
        return {
            name: [value[i] for i in clips] if isinstance(value, list) else value
            for name, value in arguments.items()
        }

    def parted(self, arguments: dict) -> tuple[dict, dict]:
        """`asked`'s arguments: those of `ASRModel.encode`, and those of `decode`."""
        own = {name: value for name, value in arguments.items() if name in ENCODE_ARGUMENTS}
        return own, {name: value for name, value in arguments.items() if name not in own}

    def slots_of(self, line: Mapping) -> dict:
        """The slots of the head's prompt that a manifest line brings."""
        prompts = self.model.config.prompts
        if prompts is None:
            return {}
        asked, spoken = line.get("target_lang"), line.get("lang")
        asked = asked or (spoken if prompts.knows(spoken) else None)
        return {"target_lang": asked} if asked else {}

    def language_pair(self, slots: Mapping) -> str | None:
        """ "de>en": what is spoken and what is written, of these slots; None: they do not say."""
        pair = [slots.get(name) for name in ("source_lang", "target_lang")]
        return ">".join(map(str, pair)) if all(pair) else None

    def first_hypothesis(self) -> Hypothesis | None:
        """What `decode_next` adds to; None: the head cannot go on from one piece of a clip to the
        next, and so not be streamed."""
        return None

    def decode_next(
        self,
        hypotheses: list[Hypothesis],
        encoded: torch.Tensor,
        first_frames: list[int],
        state: list[torch.Tensor] | None,
    ) -> list[torch.Tensor]:
        """Adds to the hypotheses what is in encoded (B, C, D), the next frames of each clip, the
        first of which is its `first_frames`th. `state`: what the call before gave, None at the
        start; clips stand in its tensors' last dimension but one."""
        raise NotImplementedError

    def for_lines(self, lines: Sequence[Mapping]) -> dict:
        """Arguments, as `asked`'s, for clips of manifest lines, each as the line wants it.
        ValueError: a slot or value that there is not."""
        if self.model.config.prompts is None:
            return {}
        return self.asked({"prompt": [self.slots_of(line) for line in lines]}, False)

    def asked(self, slots: Mapping, timestamps: bool) -> dict:
        """What `encode` and `decode` need to be told for a transcription with these slots of a
        prompt (None: not given), with or without times. ValueError: the head takes no prompt, or
        no such slot or value. `prompt`: slots, or a list of slots for each clip."""
        given = {name: value for name, value in slots.items() if value is not None}
        prompts = self.model.config.prompts
        if prompts is None:
            for name, value in given.items():
                raise ValueError(f"{name} is {value!r}, but this model's heads take no prompt")
            return {}
        own = given.pop("prompt", {})
        if isinstance(own, list):
            return {"prompt_indices": [prompts.index(given | one) for one in own]}
        return {"prompt_indices": prompts.index(given | own)}

    def log_probs(self, encoded: torch.Tensor, lengths: torch.Tensor | None = None):
        """(B, T', D), (B,) -> (B, T', V+1) float32, blank last, of a head that can align. One with
        `has_frame_posteriors` looks at each frame by itself, and needs no lengths."""
        raise NotImplementedError

    def token_spans(self, hypothesis: Hypothesis, tokenizer: Tokenizer) -> list[Span]:
        """Start and end encoder frames of each token, its text decoded alone: from its frame over
        its duration, or one frame where the head gives no durations."""
        frames = hypothesis.frames
        durations: Iterable[int] = hypothesis.durations or [1] * len(frames)
        ends = [frame + span for frame, span in zip(frames, durations, strict=True)]
        return spans_of_tokens(hypothesis, tokenizer, frames, ends)

    def text(self, hypothesis: Hypothesis) -> str:
        """What the hypothesis says, for a reader."""
        return self.tokenizer.decode(hypothesis.tokens)

    def words(self, hypothesis: Hypothesis, aggregate=min) -> list[Span]:
        """Words with their encoder frames; aggregate: confidences of tokens -> the word's."""
        tokenizer = self.tokenizer
        spans = self.token_spans(hypothesis, tokenizer)
        said = [i for i, t in enumerate(hypothesis.tokens) if t not in tokenizer.utterance_ends]
        pieces = tokenizer.ids_to_pieces([hypothesis.tokens[i] for i in said])
        return word_spans([spans[i] for i in said], pieces, tokenizer, aggregate)
