"""A room for each output head: its networks, loss, decoding, and what else differs by head.

`HEADS` leads from the names in `ModelConfig.heads` to the classes; `model.head(name)` gives the one
of a model. Nothing outside of this folder and of config/ compares a head's name. A new head is a
class here, its name in `HEADS`, and the NeMo class that has it in `config.heads`. It answers, with
the defaults in `heads/head.py`:

Before there is a model (static, from the config):
    networks(config)                {attribute: module}, NeMo's names, random weights
    n_layers(config)                layers of them: fewer tensors than layers is a wrong config
    frame_bytes(config, itemsize)   memory that decoding takes for each encoder frame
    check_vocabulary(config, tokenizer)  raises unless they fit each other
    fit(model, state_dict)          what only a checkpoint's tensors say of the modules

Its weights:
    modules                         {name in recipes: path}: what freeze.modules may call its parts,
                                    and what is unused where the head is not trained
    adaptable                       paths of its lists of layers that may get low-rank adapters
    token_layers()                  {path: layer} of layers with a row for each token
    n_rows(path, n_tokens)          how many such a layer has, where padding follows the tokens
    output_layer()                  the one whose biases decide which token wins
    logits(encoded, tokens)         (n, outputs) of one clip, to compare two models
    int8_parts()                    modules that dtype int8 quantises
    tie()                           after loading: shared parameters become one again

Training:
    family                          "ctc", "transducer" ...: what `loss.heads` of a recipe may say
    check(encoded, lengths, targets, target_lengths)    ValueError before torch reads what is wrong
    loss(encoded, lengths, targets, target_lengths, **those of loss_arguments)  -> (B,) nats
    loss_arguments                  further arguments that its loss takes, of `ASRModel.losses`
    target_counts(batch)            tokens of each clip that count in its loss, for `reduction`
    training_ids(line), language_of(line)  a manifest line's targets, prompt included
    loss_inputs(prompt_lengths)     of a batch of such lines
    reduction, share                how clips' losses become one, and its weight beside other heads
    has_lattice                     its loss sums over frames and tokens: eps, `active_share`
    needs_frame_per_token           a text needs a frame for each token, and one between equal ones
    bounds_tokens_per_frame         `data.max_tokens_per_frame` is for it

Decoding:
    decode(encoded, lengths, options, **those of decode_arguments)  -> hypotheses
    decode_arguments                further arguments that it takes (prompts), of `ASRModel.decode`
    tokenizer                       what its ids stand for
    first_hypothesis(), decode_next(...)  greedy decoding that goes on from piece to piece: streams
    token_spans(hypothesis, tokenizer)  encoder frames of each token, for times
    text(hypothesis), words(hypothesis, aggregate)  what a transcript says, and its words in frames
    prompt, decoder_ids(line)       slots and their values, where it is told what to do
    slots                           names of its prompt's slots
    slots_of(line)                  those that a manifest line brings
    language_pair(slots)            "de>en", for scores by language pair
    for_lines(lines)                arguments, as `asked`'s, for manifest lines
    for_clips(arguments, clips)     of `asked`'s answer, what is for some of the clips
    aligner                         a model that times its words, from the audio
    asked(slots, timestamps)        arguments of `encode` and `decode` for what a caller of
                                    `transcribe` wants; `parted` tells the two apart
    refused_options                 fields of DecodingOptions that mean nothing to it
    has_frame_posteriors            `log_probs(encoded)` gives each frame's distribution: alignment,
                                    InterCTC, CR-CTC, distillation; `model.frame_head` is that head
    can_stall                       may fall silent over speech, and is tried again there
    reads_frames_in_order           once from the first frame to the last, so that what the encoder
                                    gives in windows is decoded as one sequence
    longest_s                       seconds of a recording that it takes at once; longer ones are
                                    cut in pauses. None: windows, where it reads frames in order
"""

from ..config import ModelConfig
from ..text.tokenizer import Tokenizer
from .aed import AED
from .ctc import CTC
from .head import Head
from .llm import LLM
from .transducer import Transducer

HEADS: dict[str, type[Head]] = {
    "ctc": CTC,
    "rnnt": Transducer,
    "tdt": Transducer,
    "aed": AED,
    "llm": LLM,
}

__all__ = ["AED", "CTC", "HEADS", "LLM", "Head", "Transducer", "check_vocabulary"]


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError unless every head has an output for each of the tokenizer's pieces."""
    for name in config.heads:
        HEADS[name].check_vocabulary(config, tokenizer)
