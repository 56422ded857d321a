"""The whole model: holds the parts and gives the stages between audio, text and losses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .audio.features import Preprocessor
from .checkpoint.contents import Checkpoint
from .checkpoint.folder import write_folder
from .config import ModelConfig, config_errors
from .decoding import DecodingOptions, Hypothesis
from .heads import HEADS, Head, check_vocabulary
from .networks.conformer import ConformerEncoder
from .networks.heads import CTCHead, PromptKernel
from .networks.linear import Int8Weight, share_quantized
from .networks.subsampling import encoded_length
from .recordings.align import align
from .recordings.retry import retry_stuck
from .recordings.samples import checked_batch
from .recordings.stream import open_stream
from .recordings.transcribe import transcribe, transcribe_each, transcribe_iter
from .recordings.transcript import transcript
from .text.tokenizer import Tokenizer
from .transfers import sent


class ASRModel(nn.Module):
    """A FastConformer with its heads. Attribute names are NeMo's, so that the state dict is the
    checkpoint's own. Built with random weights; `load_model` reads trained ones.

    aligner: a second model, with a CTC head, that some checkpoints hold for words' times.
    """

    aligner: "ASRModel | None"

    min_duration_s = 1.0  # shorter recordings are padded, as NeMo does
    has_int8 = True  # may be loaded with 8-bit weights

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        tokenizer_files: dict[str, bytes] | None = None,
        stft_pad: str = "zeros",
    ):
        super().__init__()
        check_vocabulary(config, tokenizer)
        self.config, self.tokenizer = config, tokenizer
        self.tokenizer_files = tokenizer_files or {}
        self.preprocessor = Preprocessor(config.preprocessor, stft_pad)
        self.encoder = ConformerEncoder(config.encoder)
        if config.prompts is not None:
            self.prompt_kernel = PromptKernel(config.prompts.count, config.encoder.d_out)
        for name in config.heads:
            for attribute, module in HEADS[name].networks(config).items():
                setattr(self, attribute, module)
        self.__dict__["aligner"] = None  # not a module of this one: its weights are its own

    def train(self, mode: bool = True):
        """As nn.Module's, for `eval` too. What inference keeps of the weights is made anew: it goes
        by their versions, which neither fused or 8-bit optimizers nor `.data.copy_` count."""
        torch.autograd.graph.increment_version([*self.parameters(), *self.buffers()])
        return super().train(mode)

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sample_rate

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.pre_encode.out.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of what goes into the encoder and of what it gives."""
        return self.encoder.pre_encode.out.weight.dtype

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads' names, the default first."""
        return self.config.heads

    def head(self, name: str | None = None) -> Head:
        """A head by its name, None: the default; what it answers says `fastconformer.heads`.
        ValueError: no such head."""
        name = name or self.heads[0]
        if name not in self.heads:
            raise ValueError(f"head is {name!r}, this model has {', '.join(self.heads)}")
        return HEADS[name](self, name)

    @property
    def frame_head(self) -> Head | None:
        """The head that gives each frame's distribution by itself, None where there is none."""
        heads = (self.head(name) for name in self.heads)
        return next((head for head in heads if head.has_frame_posteriors), None)

    @property
    def ctc_head(self) -> CTCHead:
        return self.head("ctc").module

    @property
    def blank_id(self) -> int:
        return self.config.vocab_size

    def featurize(self, audio: torch.Tensor, audio_lengths: torch.Tensor):
        """audio (B, L) float32 in [-1, 1] or int16, lengths (B,) in samples -> features (B, M, T)
        float32, lengths (B,) in frames. Lengths may be on the host, here and in `encode`, and come
        back there: nobody waits for a device to know them. ValueError: shapes that do not fit."""
        there = sent(audio_lengths, audio.device)
        features, lengths = self.preprocessor(checked_batch(audio, there), there)
        if there is not audio_lengths:
            lengths = self.preprocessor.featurizer.feature_lengths(audio_lengths)
        return features, lengths

    def encoded_frames(self, n_samples: int) -> int:
        """Frames that `encode` gives for a clip of so many samples."""
        frames = self.preprocessor.featurizer.feature_lengths(
            torch.tensor([n_samples], device="cpu")
        )
        return encoded_length(self.config.encoder, int(frames))

    def encode(
        self,
        features: torch.Tensor,
        lengths: torch.Tensor,
        prompt_indices: int | Sequence[int] | None = None,
    ):
        """features (B, M, T), lengths (B,) -> encoded (B, T', D) in the model's dtype, lengths.
        `prompt_indices`: see `conditioned`. ValueError: shapes that do not fit."""
        n_mels = self.config.encoder.feat_in
        if features.shape != (len(lengths), n_mels, features.shape[-1]):
            raise ValueError(
                f"features are {tuple(features.shape)} and their lengths {tuple(lengths.shape)}, "
                f"expected (B, {n_mels}, T) and (B,)"
            )
        there = sent(lengths, features.device)
        encoded, counts = self.encoder.replayed(features.to(self.dtype), there)
        if there is not lengths:
            counts = encoded_length(self.config.encoder, lengths)
        return self.conditioned(encoded, prompt_indices), counts

    def conditioned(
        self, encoded: torch.Tensor, prompt_indices: int | Sequence[int] | None = None
    ) -> torch.Tensor:
        """What the heads take of the encoder's frames (B, T', D): told which language to write, in
        a model that has prompts for it.

        prompt_indices: `config.prompts.index` of each clip, or of all; None: of "auto". NeMo passes
        a stream's frames on without any prompt where none was set: no training ever did.
        """
        prompts = self.config.prompts
        if prompts is None:
            return encoded
        if prompt_indices is None:
            prompt_indices = prompts.index({})
        indices = sent(torch.as_tensor(prompt_indices, device="cpu"), encoded.device)
        return self.prompt_kernel(encoded, indices.expand(len(encoded)))

    def ctc_log_probs(self, encoded: torch.Tensor) -> torch.Tensor:
        """(B, T', D) -> (B, T', V+1) float32, blank last. ValueError: the model has no CTC head."""
        return self.head("ctc").log_probs(encoded)

    @property
    def parts(self) -> dict[str, str]:
        """Names of parts that recipes may use -> paths of modules; the heads have theirs."""
        prompts = {} if self.config.prompts is None else {"prompt_kernel": "prompt_kernel"}
        return {"subsampling": "encoder.pre_encode", "layers": "encoder.layers"} | prompts

    @property
    def encoder_blocks(self) -> list[str]:
        """Paths of the encoder's subsampling and layers, in the order of the data."""
        layers = (f"encoder.layers.{i}" for i in range(self.config.encoder.n_layers))
        return ["encoder.pre_encode", *layers]

    @property
    def adaptable(self) -> tuple[str, ...]:
        """Paths of the lists of layers whose matrices may get low-rank adapters."""
        heads = (path for name in self.heads for path in self.head(name).adaptable)
        return ("encoder.layers", *heads)

    @property
    def recomputable(self) -> tuple[nn.Module, ...]:
        """Networks that can run layers again in the backward pass, where `recompute` says so."""
        return (self.encoder,)

    def targets_of(self, batch) -> dict:
        """What `losses` needs to know of a batch of training."""
        inputs = {"targets": batch.targets, "target_lengths": batch.target_lengths}
        for head in map(self.head, self.heads):
            inputs |= head.loss_inputs(batch.prompt_lengths)
        return inputs

    def encoder_inputs(self, utterances: Sequence) -> dict:
        """What `encode` needs to know of training clips besides their sound: what each one's
        `encoder_slots` say. Clips without a name: nothing."""
        if self.config.prompts is None or not utterances:
            return {}
        index = self.config.prompts.index
        return {"prompt_indices": [index(utterance.encoder_slots) for utterance in utterances]}

    def joint_logits(self, encoded: torch.Tensor, targets: torch.Tensor, target_lengths=None):
        """Raw logits (B, T', U+1, V+1+N) of all pairs of frame and prefix; for small inputs only.

        targets (B, U); values beyond `target_lengths` are read as token 0 and give rows that no
        loss looks at. ValueError: the model has no transducer head.
        """
        heads = [head for head in map(self.head, self.heads) if head.has_lattice]
        head = heads[0] if heads else self.head("rnnt or tdt")
        return head.lattice_logits(encoded, targets, target_lengths)

    def aed_log_probs(self, encoded, encoded_lengths, decoder_ids) -> torch.Tensor:
        """What the attention decoder says after each token: encoded (B, T', D), decoder_ids (B, U),
        right-padded with anything -> (B, U, V8) float32. ValueError: no such head."""
        return self.head("aed").decoder_log_probs(encoded, encoded_lengths, decoder_ids)

    @property
    def prompted_head(self) -> Head:
        """The head that is told what to do. ValueError: none of this model's is."""
        for head in map(self.head, self.heads):
            if head.prompt is not None:
                return head
        raise ValueError(f"this model's heads ({', '.join(self.heads)}) take no prompt")

    def prompt_ids(self, **slots) -> list[int]:
        """The decoder's prompt as token ids; slots that are left out have the model's defaults.
        ValueError: an unknown slot or value (the message lists what there is), or no such head."""
        return self.prompted_head.prompt.ids(**slots)

    def decoder_ids(self, line: dict) -> tuple[list[int], int]:
        """A manifest line (text, and slots of the prompt) -> prompt + text + end, and how many ids
        are the prompt's. ValueError: a key that it needs is missing, an unknown value, too long."""
        return self.prompted_head.decoder_ids(line)

    def losses(
        self,
        encoded: torch.Tensor,
        encoded_lengths: torch.Tensor,
        targets: torch.Tensor,
        target_lengths: torch.Tensor,
        heads: tuple[str, ...] | None = None,
        eps: float = 0.0,
        report: dict[str, torch.Tensor] | None = None,
        **arguments,
    ) -> dict[str, torch.Tensor]:
        """Negative log-likelihood of each clip in nats, (B,) per head, with the config's sigma,
        FastEmit and clamp (and omega while training). `eps` and `report` as in
        `fused_transducer_loss`, for heads with a lattice; `arguments`: what a head's
        `loss_arguments` names. ValueError: no such head, or shapes, lengths or targets that do not
        fit."""
        asked = [self.head(name) for name in heads or self.heads]
        check_taken(arguments, {name for head in asked for name in head.loss_arguments})
        # First of all: torch's CTC loss reads whatever memory a wrong target names. The heads of a
        # model take the same targets.
        asked[0].check(encoded, encoded_lengths, targets, target_lengths)
        arguments |= {"eps": eps, "report": report}
        return {
            head.name: head.loss(
                encoded,
                encoded_lengths,
                targets,
                target_lengths,
                **{name: arguments[name] for name in head.loss_arguments if name in arguments},
            )
            for head in asked
        }

    def decode_greedy(
        self, encoded: torch.Tensor, lengths: torch.Tensor, head: str | None = None
    ) -> list[Hypothesis]:
        """Greedy tokens, frames and durations of each clip; `head` defaults to the first."""
        return self.decode(encoded, lengths, head)

    @torch.no_grad()
    def decode(
        self,
        encoded: torch.Tensor,
        lengths: torch.Tensor,
        head: str | None = None,
        options: DecodingOptions | None = None,
        **arguments,
    ) -> list[Hypothesis]:
        """encoded (B, T', D), lengths (B,) -> what `head` (default: the first) finds in each clip,
        greedily or as `options` say; `arguments`: what its `decode_arguments` names. ValueError: no
        such head."""
        chosen = self.head(head)
        check_taken(arguments, chosen.decode_arguments)
        options = options or DecodingOptions()
        options.check(chosen.refused_options, chosen.name)
        return chosen.decode(encoded, lengths, options, **arguments)

    transcribe = transcribe
    transcribe_each = transcribe_each
    transcribe_iter = transcribe_iter
    align = align
    stream = open_stream
    transcript = transcript
    retry_stuck = retry_stuck

    def changed(
        self,
        config: ModelConfig,
        tensors: dict[str, torch.Tensor] | None = None,
        tokenizer: Tokenizer | None = None,
        tokenizer_files: dict[str, bytes] | None = None,
    ) -> "ASRModel":
        """A model of another config over the same parameters and buffers, in the same mode; this
        one stays as it is.

        Args:
            tensors: {name: tensor} in the place of this model's tensors of these names.
            tokenizer, tokenizer_files: None: this model's.
        """
        before = dict(self.named_parameters(remove_duplicate=False))
        tensors = self.state_dict(keep_vars=True) | (tensors or {})
        model = skeleton(config, tensors, self.preprocessor.featurizer.stft_pad)
        share_quantized(self, model)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name not in before or before[name].requires_grad)
        model.load_state_dict(tensors, assign=True)
        model.tie()
        if config.preprocessor == self.config.preprocessor:
            model.preprocessor = self.preprocessor
        if tokenizer is None:
            tokenizer, tokenizer_files = self.tokenizer, self.tokenizer_files
        check_vocabulary(config, tokenizer)
        model.tokenizer, model.tokenizer_files = tokenizer, tokenizer_files or {}
        model.__dict__["aligner"] = self.aligner
        return model.train(self.training)

    def tie(self) -> None:
        """Makes parameters that are one again one, after each came from a checkpoint by itself."""
        self.encoder.tie_biases()
        for name in self.heads:
            self.head(name).tie()

    def to_checkpoint(self) -> Checkpoint:
        """Config, weights and tokenizer files, as `save` and `write_nemo` take them. ValueError:
        the weights are int8."""
        if any(isinstance(getattr(m, "weight", None), Int8Weight) for m in self.modules()):
            raise ValueError("an int8 model cannot be saved; load it with another dtype for that")
        aligner = self.aligner and self.aligner.to_checkpoint()
        files = self.tokenizer_files
        return Checkpoint(self.config.nemo, self.state_dict(), files, aligner=aligner)

    def save(self, folder: str | Path):
        """Writes config.json, model.safetensors and the tokenizer's files to `folder`."""
        write_folder(folder, self.to_checkpoint())


def check_taken(given: dict, known) -> None:
    """ValueError where an argument is given that is not among the known."""
    for name in given:
        if name not in known:
            raise ValueError(f"{name} is an argument of none of the heads that were asked")


def skeleton(
    config: ModelConfig, state_dict: dict[str, torch.Tensor], stft_pad: str = "zeros"
) -> ASRModel:
    """The model that has these tensors, without memory for them yet, and without a tokenizer."""
    with torch.device("meta"), NoInitialisation(), config_errors():
        heads = [HEADS[name] for name in config.heads]
        n_layers = config.encoder.n_layers + sum(head.n_layers(config) for head in heads)
        if n_layers > len(state_dict):  # before they are built
            raise ValueError(
                f"the config has {n_layers} layers, the weights {len(state_dict)} tensors"
            )
        model = ASRModel(config, _NoTokenizer(config.vocab_size), stft_pad=stft_pad)
        for head in heads:
            head.fit(model, state_dict)
    return model


class NoInitialisation(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device it does nothing, but imports half of torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@dataclass
class _NoTokenizer:
    vocab_size: int
