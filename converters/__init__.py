"""Commands that bring checkpoints and tokenizers in and out, and what they share."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastconformer.checkpoint.contents import Checkpoint


def check(checkpoint: "Checkpoint") -> str:
    """Raises ValueError unless the options, the tokenizer and the tensors fit one another.
    Returns a line that describes the model."""
    # Imported here: --help and bad usage need no torch.
    from fastconformer.config import ModelConfig
    from fastconformer.heads import check_vocabulary
    from fastconformer.load import check_state_dict
    from fastconformer.text.tokenizer import load_tokenizer

    if checkpoint.kind != "nemo":
        raise ValueError("this is no model of NeMo's; see converters.st2funasr")
    config = ModelConfig.from_nemo(checkpoint.config)
    check_state_dict(config, checkpoint.state_dict)
    check_vocabulary(config, load_tokenizer(checkpoint.config, checkpoint.tokenizer_files))
    beside = ""
    if checkpoint.aligner:
        try:
            beside = f"\nwith a model for times: {check(checkpoint.aligner)}"
        except ValueError as error:
            raise ValueError(f"the CTC model for times: {error}") from None
    n_values = sum(tensor.numel() for tensor in checkpoint.state_dict.values())
    return (
        f"{config.class_name}, heads {' '.join(config.heads)}, {n_values / 1e6:.2f} M parameters "
        f"and statistics, {config.vocab_size} tokens, {config.sample_rate} Hz{beside}"
    )
