"""Where a training stands, in words: five phases that a model goes through on its way from noise.

Their limits stand here alone, for the console, TensorBoard and the report. They are drawn where the
advice changes: below a quarter of the characters a model says next to nothing, and every model does
so at first, for silence costs least; above 90 % of wrong words what it says has little to do with
the sound; at half of the words right a reader follows it; above 80 % right what is left are names,
rare words and noise.
"""

PHASES = {  # name: what it means
    "random characters": "it writes pieces that have little to do with the audio; go on",
    "mute": "it has learnt that silence costs least, as every model does on its way; wait",
    "basic": "frequent words come out; most are still wrong",
    "major vocabulary": "most common words are right; rare ones and endings are not",
    "convergence": "what is left are names, rare words and noise; watch for overfitting",
}
MUTE_EMISSION = 0.25  # characters that are written, over those that were said
RANDOM_WER, BASIC_WER, MAJOR_WER = 0.9, 0.5, 0.2


def phase(wer: float, emission: float) -> str:
    """A name of PHASES, from the share of words that are wrong and of characters that come out."""
    if emission < MUTE_EMISSION:
        return "mute"
    if wer > RANDOM_WER:
        return "random characters"
    if wer > BASIC_WER:
        return "basic"
    return "major vocabulary" if wer > MAJOR_WER else "convergence"
