"""Fun-ASR-Nano, the second model: SAN-M encoder, adaptor, language model, CTC branch.

It has the same few names as `ASRModel`; attribute names of its parts are FunASR's, so that the
state dict is the checkpoint's own. The language model reads the first eighth of the adaptor's rows:
encoder and adaptor, which attend to all of a clip, were trained to put its content there.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .audio.fbank import Fbank
from .checkpoint.contents import Checkpoint, check_tensors
from .checkpoint.folder import write_folder
from .checkpoint.funasr_folder import VOCABULARY
from .config import config_errors
from .config.funasr import AdaptorConfig, FunASRConfig
from .decoding import DecodingOptions, Hypothesis
from .heads.llm import LLM, AttendedCTC, speech_rows
from .model import NoInitialisation, check_taken
from .networks.qwen3 import Qwen3
from .networks.sanm import Adaptor, CTCOutput, SANMEncoder
from .recordings.align import align
from .recordings.retry import retry_stuck
from .recordings.samples import checked_batch
from .recordings.stream import open_stream
from .recordings.transcribe import transcribe, transcribe_each, transcribe_iter
from .recordings.transcript import transcript
from .text.byte_bpe import QwenTokenizer, TiktokenTokenizer
from .text.chat import context_header, instruction
from .transfers import sent

HEADS = {"llm": LLM, "ctc": AttendedCTC}
CTC_PARTS = ("ctc_decoder.", "ctc.")

logger = logging.getLogger(__name__)


class FunASRNano(nn.Module):
    """Built with random weights; `load_model` reads trained ones."""

    min_duration_s = 0.0  # recordings are not padded
    has_int8 = False

    def __init__(self, config: FunASRConfig, tokenizer_files: dict[str, bytes]):
        super().__init__()
        self.config, self.tokenizer_files = config, tokenizer_files
        self.tokenizer = QwenTokenizer(tokenizer_files["tokenizer.json"], config.llm.vocab_size)
        self.ctc_tokenizer = _ctc_tokenizer(config, tokenizer_files) if config.ctc else None
        with torch.device("cpu"):
            self.preprocessor = Fbank(config.frontend)
        encoder, llm = config.encoder, config.llm
        self.audio_encoder = SANMEncoder(
            encoder.d_in,
            encoder.d_model,
            encoder.n_heads,
            encoder.d_inner,
            encoder.n_blocks,
            encoder.n_tp_blocks,
            encoder.kernel,
            encoder.dropout,
            encoder.attention_dropout,
        )
        self.audio_adaptor = _adaptor(config.adaptor)
        self.llm = Qwen3(llm)
        if config.ctc:
            self.ctc_decoder = _adaptor(config.ctc)
            self.ctc = CTCOutput(config.ctc.d_out, config.ctc_classes)

    # --- what it is ------------------------------------------------------------------------------

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sample_rate

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.audio_encoder.tp_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the encoder's weights."""
        return self.audio_encoder.tp_norm.weight.dtype

    @property
    def encoder(self) -> SANMEncoder:
        """The encoder, as other models call it."""
        return self.audio_encoder

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads' names, the default first."""
        return self.config.heads

    def head(self, name: str | None = None) -> LLM | AttendedCTC:
        """A head by its name, None: the default. ValueError: no such head."""
        name = name or self.heads[0]
        if name not in self.heads:
            lacking = f"; its checkpoint has no {name} weights" if name in HEADS else ""
            raise ValueError(f"head is {name!r}, this model has {', '.join(self.heads)}{lacking}")
        return HEADS[name](self, name)

    @property
    def frame_head(self) -> None:
        """There is none: the CTC branch attends to the whole clip."""
        return None

    @property
    def blank_id(self) -> int:
        """Of the CTC branch."""
        return self.config.vocab_size

    # --- in training -----------------------------------------------------------------------------

    @property
    def parts(self) -> dict[str, str]:
        """Names of parts that recipes may use -> paths of modules; `ctc` is all of the branch."""
        return {"encoder": "audio_encoder", "adaptor": "audio_adaptor", "ctc": "ctc*"}

    @property
    def encoder_blocks(self) -> list[str]:
        """Paths of the encoder's layers, in the order of the data."""
        lists = (
            ("encoders0", self.audio_encoder.encoders0),
            ("encoders", self.audio_encoder.encoders),
        )
        lists += (("tp_encoders", self.audio_encoder.tp_encoders),)
        return [f"audio_encoder.{name}.{i}" for name, layers in lists for i in range(len(layers))]

    @property
    def adaptable(self) -> tuple[str, ...]:
        """Paths of the lists of layers whose matrices may get low-rank adapters."""
        return ("llm.model.layers",)

    @property
    def recomputable(self) -> tuple[nn.Module, ...]:
        """Networks that can run layers again in the backward pass, where `recompute` says so."""
        return self.audio_encoder, self.llm

    def targets_of(self, batch) -> dict:
        """What `losses` needs to know of a batch of training: texts, and what is asked for each: a
        line of a chat says it itself, with its context."""
        texts, prompts = [], []
        rows = zip(batch.utterances, batch.targets, batch.target_lengths.tolist(), strict=True)
        for line, tokens, count in rows:
            texts.append(line.text or self.tokenizer.decode(tokens[:count].tolist()))
            asked = line.others.get("prompt")
            asked = self.prompt() if asked is None else asked
            prompts.append(context_header(asked, line.others) + asked)
        return {"texts": texts, "prompts": prompts}

    def encoder_inputs(self, utterances) -> dict:
        """As `ASRModel.encoder_inputs`: the encoder hears sound alone."""
        return {}

    # --- stages ----------------------------------------------------------------------------------

    def featurize(self, audio: Tensor, audio_lengths: Tensor):
        """audio (B, L) float32 in [-1, 1] or int16, lengths (B,) in samples -> features
        (B, 560, T) float32, of 60 ms each, lengths (B,). ValueError: shapes that do not fit."""
        audio_lengths = sent(audio_lengths, audio.device)
        return self.preprocessor(checked_batch(audio, audio_lengths), audio_lengths)

    def encoded_frames(self, n_samples: int) -> int:
        """Rows that `encode` gives for a clip of so many samples."""
        return int(self.preprocessor.feature_lengths(torch.tensor([n_samples], device="cpu")))

    def encode(self, features: Tensor, lengths: Tensor):
        """features (B, 560, T), lengths (B,) -> encoded (B, T, D) in the model's dtype, lengths.
        ValueError: shapes that do not fit."""
        width = self.config.encoder.d_in
        if features.shape != (len(lengths), width, features.shape[-1]):
            raise ValueError(
                f"features are {tuple(features.shape)} and their lengths {tuple(lengths.shape)}, "
                f"expected (B, {width}, T) and (B,)"
            )
        return self.audio_encoder(features.transpose(1, 2).to(self.dtype), lengths)

    def adapt(self, encoded: Tensor, lengths: Tensor):
        """encoded (B, T, D), lengths (B,) -> rows of the language model's width (B, T, H), and how
        many of each clip's it reads (B,): the first eighth, or all."""
        dtype = self.audio_adaptor.linear1.weight.dtype
        rows, counts = self.audio_adaptor(encoded.to(dtype), lengths)
        if self.config.low_frame_rate:
            counts = torch.minimum(speech_rows(lengths), counts)
        return rows, counts

    def ctc_log_probs(self, encoded: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D), (B,) -> (B, T, V+1) float32, blank last. ValueError: there are no CTC
        weights."""
        return self.head("ctc").log_probs(encoded, lengths)

    def prompt(
        self, language: str | None = None, hotwords: Sequence[str] = (), itn: bool = True
    ) -> str:
        """What the language model is asked for at transcription; see `text.chat.instruction`."""
        return instruction(language, hotwords, itn)

    def training_prompt(
        self,
        language: str | None = None,
        itn: bool = True,
        context: dict[str, str] | None = None,
    ) -> str:
        """What it is asked for in training, as FunASR does: a context header comes first, with
        nothing behind it where nothing is known of the clip."""
        asked = instruction(language, (), itn)
        return context_header(asked, context) + asked

    def llm_inputs(
        self, adapted: Tensor, counts: Tensor, texts: Sequence[str], prompts: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `adapt` gives, texts and prompts of a batch -> ids, embeds, mask, labels, all
        padded on the right; see `heads.llm.LLM.inputs`."""
        return self.head("llm").inputs(adapted, counts, texts, prompts)

    def losses(
        self,
        encoded: Tensor,
        encoded_lengths: Tensor,
        texts: Sequence[str],
        prompts: Sequence[str] | None = None,
        heads: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Negative log-likelihood of each clip's text in nats, summed over its tokens, (B,) per
        head. `prompts`: what the language model was asked, None: `training_prompt()`."""
        asked = [self.head(name) for name in heads or self.heads]
        if len(texts) != len(encoded):
            raise ValueError(f"{len(texts)} texts for {len(encoded)} clips")
        given = {"texts": texts, "prompts": prompts}
        return {
            head.name: head.loss(
                encoded,
                encoded_lengths,
                None,
                None,
                **{name: given[name] for name in head.loss_arguments},
            )
            for head in asked
        }

    @torch.no_grad()
    def decode(
        self,
        encoded: Tensor,
        lengths: Tensor,
        head: str | None = None,
        options: DecodingOptions | None = None,
        **arguments,
    ) -> list[Hypothesis]:
        """encoded (B, T, D), lengths (B,) -> what `head` (default: the first) finds in each clip;
        `arguments`: what its `decode_arguments` names. ValueError: no such head or argument."""
        chosen = self.head(head)
        check_taken(arguments, chosen.decode_arguments)
        options = options or DecodingOptions()
        options.check(chosen.refused_options, chosen.name)
        return chosen.decode(encoded, lengths, options, **arguments)

    transcribe = transcribe
    transcribe_each = transcribe_each
    transcribe_iter = transcribe_iter
    stream = open_stream
    align = align
    transcript = transcript
    retry_stuck = retry_stuck

    # --- on disk ---------------------------------------------------------------------------------

    def with_sample_rate(self, rate_hz: int, mel_edges: str = "keep") -> "FunASRNano":
        """A model over the same tensors with a front end of another rate; see
        `FunASRConfig.with_sample_rate`."""
        return self.changed(self.config.with_sample_rate(rate_hz, mel_edges))

    def changed(self, config: FunASRConfig) -> "FunASRNano":
        """A model of another config over the same tensors, in the same mode; this one stays as it
        is."""
        changed = _skeleton(config, self.tokenizer_files)
        changed.load_state_dict(self.state_dict(), assign=True)
        changed.tie()
        changed.preprocessor.to(self.device)
        return changed.train(self.training)

    def tie(self) -> None:
        """Makes parameters that are one again one, after each came from a checkpoint by itself."""
        self.head("llm").tie()

    def to_checkpoint(self) -> Checkpoint:
        """Config, weights and tokenizer files, the language model's always inside."""
        return Checkpoint(self.config.funasr, self.state_dict(), self.tokenizer_files)

    def save(self, folder: str | Path):
        """Writes config.json, model.safetensors and the tokenizers' files to `folder`."""
        write_folder(folder, self.to_checkpoint())


def _adaptor(config: AdaptorConfig) -> Adaptor:
    return Adaptor(
        config.d_in,
        config.d_inner,
        config.d_out,
        config.n_layers,
        config.n_heads,
        config.downsample,
        config.dropout,
        config.attention_dropout,
    )


def _ctc_tokenizer(config: FunASRConfig, files: dict[str, bytes]) -> TiktokenTokenizer:
    name = str(config.funasr["files"].get(VOCABULARY)).removeprefix("nemo:")
    if name not in files:
        raise ValueError(
            "the checkpoint has CTC weights but no vocabulary for them "
            "(ctc_tokenizer_conf.vocab_path, a .tiktoken file)"
        )
    return TiktokenTokenizer(files[name], config.vocab_size, config.n_languages)


def _skeleton(config: FunASRConfig, files: dict[str, bytes]) -> FunASRNano:
    """The model without memory for its weights."""
    with torch.device("meta"), NoInitialisation(), config_errors():
        return FunASRNano(config, files)


def funasr_of(checkpoint: Checkpoint) -> FunASRNano:
    """The model of a checkpoint in memory, whose tensors it takes, each in its own precision.

    Raises:
        ValueError: no language model in it, tensors that do not fit, an unsupported option.
    """
    model, state = fitted(checkpoint)
    model.load_state_dict(state, assign=True)
    model.tie()
    return model


def fitted(checkpoint: Checkpoint) -> tuple[FunASRNano, dict[str, Tensor]]:
    """The model of a checkpoint without memory for its weights, and the tensors that are to become
    them: without the CTC branch where it is not whole.

    Raises:
        ValueError: see `funasr_of`.
    """
    config, state = FunASRConfig.from_funasr(checkpoint.config), dict(checkpoint.state_dict)
    if not any(name.startswith("llm.") for name in state):
        raise ValueError(
            "the weights hold no language model (no llm.* tensors): it was saved with "
            "effective_save_name_excludes: [llm.]; converters.funasr2st --like FOLDER adds that of "
            "the folder that it was trained from"
        )
    _check_layers(config, state)
    if config.llm.tie_word_embeddings:
        tied = state.setdefault("llm.lm_head.weight", state.get("llm.model.embed_tokens.weight"))
        if tied is not None and not torch.equal(tied, state["llm.model.embed_tokens.weight"]):
            raise ValueError(
                "llm.lm_head.weight is not the embedding, which the language model's config.json "
                "says (tie_word_embeddings)"
            )
    if config.ctc:
        config, state = _with_whole_ctc(config, state)
    model = _skeleton(config, checkpoint.tokenizer_files)
    check_tensors(model.state_dict(), state)
    return model, state


def _check_layers(config: FunASRConfig, state: dict[str, Tensor]) -> None:
    layers = config.encoder.n_blocks + config.encoder.n_tp_blocks + config.llm.n_layers
    layers += config.adaptor.n_layers + (config.ctc.n_layers if config.ctc else 0)
    if layers > len(state):  # before they are built
        raise ValueError(f"the config has {layers} layers, the weights {len(state)} tensors")


def _with_whole_ctc(config: FunASRConfig, state: dict[str, Tensor]):
    """Without the CTC branch where its tensors are not all there, as FunASR does."""
    with torch.device("meta"), NoInitialisation(), config_errors():
        parts = {"ctc_decoder": _adaptor(config.ctc)}
        parts["ctc"] = CTCOutput(config.ctc.d_out, config.ctc_classes)
    expected = [f"{part}.{name}" for part, module in parts.items() for name in module.state_dict()]
    missing = [name for name in expected if name not in state]
    if not missing:
        return config, state
    if len(missing) < len(expected):
        logger.warning(
            "left the CTC branch out: %d of its %d tensors are missing, the first is %s",
            len(missing), len(expected), missing[0],
        )  # fmt: skip
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(CTC_PARTS)}
    return config.without_ctc(), rest
