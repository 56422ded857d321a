"""What the layouts of all ONNX clients share: the vocabulary's lines, and what none can run."""

from ..config import EncoderConfig, ModelConfig, PreprocessorConfig
from ..model import ASRModel

BLANK = "<blk>"  # the name that clients look for


def vocabulary_lines(model: ASRModel, spoken_unknown: bool = False) -> str:
    """`piece id`, a line each, the blank last, which an attention decoder never writes. With
    `spoken_unknown` the unknown piece is what it stands for in a text (" ⁇ "), as clients write
    pieces out as they are.

    ValueError: a piece that such a line cannot hold.
    """
    lines, tokenizer = [], model.tokenizer
    for index, piece in enumerate(tokenizer.pieces):
        if spoken_unknown and index == tokenizer.unk_id:
            piece = tokenizer.join([piece])
        piece = piece.replace(" ", "▁")  # of character vocabularies; clients turn it back
        if piece == BLANK:
            raise ValueError(
                f"token {index} is {BLANK!r}, the name that clients have for the blank"
            )
        if not piece or piece.split() != [piece]:
            raise ValueError(f"token {index} is {piece!r}; a line of the vocabulary cannot hold it")
        lines.append(f"{piece} {index}\n")
    return "".join(lines) + f"{BLANK} {len(lines)}\n"


def check_heads(config: ModelConfig) -> None:
    """ValueError: TDT durations that clients, which take the class's index for it, get wrong; a
    stateless prediction network or a HAT joint, which none of them has."""
    if config.decoder and config.decoder.context_size:
        raise ValueError("decoder: clients have an LSTM there, not a StatelessTransducerDecoder")
    if config.joint and config.joint.hat:
        raise ValueError("joint: clients have no HATJoint")
    durations = config.loss.durations
    if durations != tuple(range(len(durations))):
        raise ValueError(
            f"the durations are {list(durations)}; clients take the index of a duration for the "
            "duration itself, so only 0, 1, 2 ... can be exported"
        )


def check_front_end(client: str, preprocessor: PreprocessorConfig, wanted: dict) -> None:
    """ValueError naming the first number in which the client's own features differ: `wanted` maps
    names of the preprocessor's config to the values that the client's are computed with."""
    for name, values in wanted.items():
        value = getattr(preprocessor, name)
        if value not in values:
            raise ValueError(
                f"preprocessor: {name} is {value!r}; {client} computes its features with "
                f"{' or '.join(map(repr, values))}"
            )


def check_unprompted(client: str, config: ModelConfig) -> None:
    """ValueError: a model that is told a language, for clients who build the network themselves."""
    if config.prompts is not None:
        raise ValueError(
            f"the model is told a language behind its encoder ({config.class_name}); {client} "
            "knows no such layers, and without them its texts would be others"
        )


def check_encoder(client: str, encoder: EncoderConfig) -> None:
    """ValueError: an encoder other than that of the clients who build the network themselves."""
    for name, value, wanted in (
        ("self_attention_model", encoder.self_attention_model, ("rel_pos",)),
        ("att_context_size", encoder.att_contexts[0], ((-1, -1),)),
        ("subsampling", encoder.subsampling, ("dw_striding",)),
        ("causal_downsampling", encoder.causal_downsampling, (False,)),
        ("conv_norm_type", encoder.conv_norm_type, ("batch_norm",)),
        ("conv_context_size", encoder.conv_context[0], (encoder.conv_context[1],)),
        ("reduction", encoder.reduces, (False,)),
        ("adapters", tuple(a.name for a in encoder.adapters), ((),)),
        ("feat_out", encoder.d_out, (encoder.d_model,)),
    ):
        if value not in wanted:
            raise ValueError(f"encoder.{name} is {value!r}; {client} has {wanted[0]!r}")
