"""A language model as a head: it reads a prompt with rows of speech in it, and writes the text.

    before [ids]  speech [the first n rows of the adaptor]  behind [ids]  text [ids]  <|im_end|>

The targets of its loss are texts, not token ids, and each clip has its prompt. Times come from the
CTC branch, where the model has one: the text is aligned, and every byte of it gets frames.
Source: FunASR's FunASRNano.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..decoding import DecodingOptions, Hypothesis, ctc_align, ctc_beam, ctc_greedy
from ..decoding.ctc import LOG_PROBS
from ..decoding.llm import MAX_TOKENS, llm_greedy
from ..recordings.timestamps import Span
from ..text.byte_bpe import ByteTokenizer
from ..text.chat import answer_ids, chat_ids
from .ctc import CTC
from .head import Head

SWITCHES = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
LONGEST_S = 30.0  # what it was trained on, up to 35
IGNORED = -100  # a label that counts nothing


def speech_rows(lengths: Tensor) -> Tensor:
    """Rows of speech that the language model is given, of encoded rows (B,): halved three times,
    rounding up."""
    for _ in range(3):
        lengths = (lengths + 1).div(2, rounding_mode="floor")
    return lengths


class LLM(Head):
    """See the module's docstring."""

    family = "llm"
    reads_frames_in_order = False
    longest_s = LONGEST_S
    loss_arguments = ("texts", "prompts")
    decode_arguments = ("prompts", "max_tokens", "times")
    slots = ("language", "hotwords", "itn", "max_tokens")
    refused_options = ("beam", "lm", "boost", "allow", "length_penalty", "max_generation_delta")

    @property
    def modules(self) -> dict[str, str]:
        return {"llm": "llm", "adaptor": "audio_adaptor"}

    def token_layers(self) -> dict[str, nn.Module]:
        llm = self.model.llm
        return {"llm.model.embed_tokens": llm.model.embed_tokens, "llm.lm_head": llm.lm_head}

    def tie(self) -> None:
        self.model.llm.tie()

    @property
    def reduction(self) -> str:
        return self.model.config.llm_reduction

    @property
    def share(self) -> float:
        return 1.0

    def prompt_embeds(
        self, adapted: Tensor, counts: Tensor, prompts: Sequence[str]
    ) -> list[tuple[Tensor, Tensor]]:
        """Adapted rows (B, T, D), how many of them are read (B,) -> ids (S_i,) and embeddings
        (S_i, D) of each clip's prompt; ids of speech are 0."""
        config, llm = self.model.config, self.model.llm
        parts = []
        for rows, n_rows, prompt in zip(adapted, counts.tolist(), prompts, strict=True):
            shape = config.system_prompt, config.think
            before, behind = chat_ids(self.model.tokenizer, prompt, *shape)
            ids = torch.tensor([*before, *[0] * n_rows, *behind], device=adapted.device)
            embeds = llm.embed(ids)
            first = len(before)
            speech = rows[:n_rows].to(embeds.dtype)
            parts.append((ids, torch.cat((embeds[:first], speech, embeds[first + n_rows :]))))
        return parts

    def inputs(self, adapted: Tensor, counts: Tensor, texts: Sequence[str], prompts):
        """A batch to train on, padded on the right.

        Args:
            adapted, counts: (B, T, D) and (B,) of `model.adapt`.
            texts: what the model is to say; prompts: what it is asked, one each.
        Returns:
            ids (B, S), 0 on speech and padding; embeds (B, S, D); valid (B, S), True but on
            padding; labels (B, S), -100 up to the text and on padding.
        """
        rows = []
        for (ids, embeds), text in zip(
            self.prompt_embeds(adapted, counts, prompts), texts, strict=True
        ):
            answer = torch.tensor(answer_ids(self.model.tokenizer, text), device=ids.device)
            labels = torch.cat((torch.full_like(ids, IGNORED), answer))
            embeds = torch.cat((embeds, self.model.llm.embed(answer)))
            rows.append((torch.cat((ids, answer)), embeds, labels.new_ones(len(labels)), labels))
        ids, embeds, valid, labels = zip(*rows, strict=True)

        def padded(parts, value=0):
            return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

        return padded(ids), padded(embeds), padded(valid).bool(), padded(labels, IGNORED)

    def loss(self, encoded, encoded_lengths, targets, target_lengths, texts, prompts=None):
        """Cross-entropy over each clip's text and its end, summed, (B,). `targets` are not read.

        Args:
            texts: of each clip; prompts: of each clip, None: `model.training_prompt()`.
        """
        model = self.model
        prompts = [model.training_prompt()] * len(encoded) if prompts is None else prompts
        adapted = model.adapt(encoded, encoded_lengths)
        _, embeds, valid, labels = self.inputs(*adapted, texts, prompts)
        positions = (valid.cumsum(1) - 1).clamp(min=0)
        hidden = model.llm(embeds, valid, positions)[:, :-1]
        labels = labels[:, 1:]
        counts = labels != IGNORED
        # the vocabulary is wide: logits at the positions of texts, and nowhere else
        logits = model.llm.lm_head(hidden[counts]).float()
        loss = F.cross_entropy(logits, labels[counts], reduction="none")
        return loss.new_zeros(labels.shape).masked_scatter(counts, loss).sum(1)

    def target_counts(self, batch) -> Tensor:
        """Of each text and its end."""
        tokenizer = self.model.tokenizer
        counts = [len(answer_ids(tokenizer, utterance.text)) for utterance in batch.utterances]
        return torch.tensor(counts, device=batch.target_lengths.device)

    def decode(
        self,
        encoded: Tensor,
        lengths: Tensor,
        options: DecodingOptions,
        prompts: Sequence[str] | str | None = None,
        max_tokens: int = MAX_TOKENS,
        times: bool = False,
    ) -> list[Hypothesis]:
        """Greedy texts.

        Args:
            prompts: what the model is asked, one for all or one each; None: `model.prompt()`.
            max_tokens: longest text.
            times: align the texts: hypotheses get frames and durations.
        Raises:
            ValueError: times without a CTC branch.
        """
        model = self.model
        if prompts is None:
            prompts = model.prompt()
        prompts = [prompts] * len(encoded) if isinstance(prompts, str) else prompts
        parts = self.prompt_embeds(*model.adapt(encoded, lengths), prompts)
        embeds = [embed for _, embed in parts]
        repeats = options.max_repeats
        found = llm_greedy(model.llm, embeds, max_tokens, options.confidence, repeats)
        if times:
            self._add_frames(found, encoded, lengths)
        return found

    def asked(self, slots: Mapping, timestamps: bool) -> dict:
        """Slots: language, hotwords and itn, which make the prompt (see `text.chat.instruction`),
        and max_tokens. Words of a command line are read too: itn "no", hotwords "A,B"."""
        given = {name: value for name, value in slots.items() if value is not None}
        unknown = given.keys() - set(self.slots)
        if unknown:
            raise ValueError(
                f"{sorted(unknown)[0]} is nothing that this model's prompt takes; expected "
                "language, hotwords, itn or max_tokens"
            )
        if timestamps and "ctc" not in self.model.heads:
            raise ValueError("times need CTC weights, which this checkpoint does not have")
        max_tokens = int(given.pop("max_tokens", MAX_TOKENS))
        if isinstance(given.get("hotwords"), str):
            given["hotwords"] = [w.strip() for w in given["hotwords"].split(",") if w.strip()]
        if isinstance(given.get("itn"), str):
            if given["itn"].lower() not in SWITCHES:
                raise ValueError(f"itn is {given['itn']!r}, expected one of {', '.join(SWITCHES)}")
            given["itn"] = SWITCHES[given["itn"].lower()]
        prompt = self.model.prompt(**given)
        return {"prompts": prompt, "max_tokens": max_tokens, "times": timestamps}

    def _add_frames(self, found: list[Hypothesis], encoded: Tensor, lengths: Tensor) -> None:
        """Frames and durations of each token, by the CTC branch: of the first and to the last of
        those that its bytes are in."""
        model, ctc = self.model, self.model.head("ctc")
        rows = ctc.rows(encoded, lengths)
        for row, hypothesis in enumerate(found):
            special = model.tokenizer.special_ids
            kept = [i for i in hypothesis.tokens if i not in special]
            said = model.tokenizer.bytes_of(kept)
            ids = model.ctc_tokenizer.encode(said.decode("utf-8", errors="replace"))
            log_probs, columns = ctc.log_probs_of(rows[row, : lengths[row]], ids)
            frames = byte_frames(model.ctc_tokenizer, ids, log_probs, columns)
            frames += [frames[-1] if frames else (0, 0)] * (len(said) - len(frames))
            hypothesis.frames, hypothesis.durations, at = [], [], 0
            for token in hypothesis.tokens:
                n_bytes = 0 if token in special else len(model.tokenizer.token_bytes[token])
                spans = frames[at : at + n_bytes] or frames[max(0, at - 1) : at] or [(0, 0)]
                hypothesis.frames.append(spans[0][0])
                hypothesis.durations.append(max(0, spans[-1][1] - spans[0][0]))
                at += n_bytes


def byte_frames(
    tokenizer: ByteTokenizer, ids: list[int], log_probs: Tensor, columns: list[int]
) -> list[tuple[int, int]]:
    """First and end row of each byte of a text of CTC tokens; (T, C) log-probabilities and the
    tokens' columns are those of `log_probs_of`. A text that has more tokens than the clip has rows
    for is spread evenly over them."""
    n_rows = len(log_probs)
    (aligned,) = ctc_align(log_probs[None], torch.tensor([n_rows], device="cpu"), [columns])
    if len(aligned.frames) < len(ids):
        edges = [round(i * n_rows / len(ids)) for i in range(len(ids) + 1)]
        spans = list(itertools.pairwise(edges))
    else:
        pairs = zip(aligned.frames, aligned.durations, strict=True)
        spans = [(frame, frame + duration) for frame, duration in pairs]
    return [
        span
        for token, span in zip(ids, spans, strict=True)
        for _ in range(len(tokenizer.token_bytes[token]))
    ]


class AttendedCTC(CTC):
    """CTC behind a small Transformer, FunASR's `ctc_decoder` and `ctc`: it needs to know where each
    clip ends. Its targets are ids of the CTC branch's own tokenizer."""

    has_frame_posteriors = False  # not of each frame by itself
    reads_frames_in_order = False
    longest_s = LONGEST_S
    loss_arguments = ("texts",)

    @property
    def modules(self) -> dict[str, str]:
        return {"ctc_decoder": "ctc_decoder", "ctc": "ctc"}

    @property
    def tokenizer(self) -> ByteTokenizer:
        return self.model.ctc_tokenizer

    def token_layers(self) -> dict[str, nn.Module]:
        return {"ctc.ctc_lo": self.model.ctc.ctc_lo}

    @property
    def reduction(self) -> str:
        return self.model.config.ctc_reduction

    def target_counts(self, batch) -> Tensor:
        counts = [len(self.tokenizer.encode(utterance.text)) for utterance in batch.utterances]
        return torch.tensor(counts, device=batch.target_lengths.device)

    @property
    def share(self) -> float:
        return self.model.config.ctc_weight

    def asked(self, slots: Mapping, timestamps: bool) -> dict:
        return Head.asked(self, slots, timestamps)

    def first_hypothesis(self) -> None:
        """It hears a clip as a whole."""

    def log_probs(self, encoded: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D), (B,) -> (B, T, V+1) float32, blank last."""
        return self.model.ctc(self.rows(encoded, lengths)).float().log_softmax(-1)

    def log_probs_of(self, rows: Tensor, ids: list[int]) -> tuple[Tensor, list[int]]:
        """Log-probabilities of a text's tokens and of blank alone, of one clip's `rows` (T, D):
        (T, C), blank last, and the column of each token. All classes at once would be 60,000."""
        columns = {token: number for number, token in enumerate(dict.fromkeys(ids))}
        kept = torch.tensor([*columns, self.model.blank_id], device=rows.device)
        size = max(1, LOG_PROBS // (self.model.blank_id + 1))
        parts = [self.model.ctc(p).float().log_softmax(-1)[:, kept] for p in rows.split(size)]
        return torch.cat(parts), [columns[token] for token in ids]

    def rows(self, encoded: Tensor, lengths: Tensor) -> Tensor:
        """What the branch's Transformer makes of (B, T, D), (B,)."""
        dtype = self.model.ctc.ctc_lo.weight.dtype
        return self.model.ctc_decoder(encoded.to(dtype), lengths)[0]

    def decode(
        self, encoded: Tensor, lengths: Tensor, options: DecodingOptions
    ) -> list[Hypothesis]:
        bias = options.bias(self.tokenizer, encoded.device)
        common = {"bias": bias, "confidence": options.confidence}
        if not options.is_greedy:
            fusion = options.fusion(self.tokenizer, encoded.device)
            log_probs = self.log_probs(encoded, lengths)
            return ctc_beam(log_probs, lengths, options.beam, fusion, **common)
        rows = self.rows(encoded, lengths)
        size = max(1, LOG_PROBS // (max(1, len(rows)) * (self.model.blank_id + 1)))
        pieces = (self.model.ctc(part).float().log_softmax(-1) for part in rows.split(size, dim=1))
        return ctc_greedy(pieces, lengths, **common)

    def token_spans(self, hypothesis: Hypothesis, tokenizer: ByteTokenizer) -> list[Span]:
        return Head.token_spans(self, hypothesis, tokenizer)

    def loss(self, encoded, encoded_lengths, targets, target_lengths, texts=None):
        """Negative log-likelihood of each text, (B,); `texts`, where given, take the place of
        `targets`."""
        if texts is not None:
            ids = [self.tokenizer.encode(text) for text in texts]
            target_lengths = torch.tensor([len(row) for row in ids], device=encoded.device)
            targets = torch.tensor([token for row in ids for token in row], device=encoded.device)
        return F.ctc_loss(
            self.log_probs(encoded, encoded_lengths).transpose(0, 1),
            targets,
            encoded_lengths,
            target_lengths,
            blank=self.model.blank_id,
            reduction="none",
            zero_infinity=True,
        )
