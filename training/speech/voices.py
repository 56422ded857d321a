"""eSpeak NG, and the voices that it lends: accents and variants of training, and held-out ones.

Facts about the C interface: eSpeak NG's `speak_lib.h`, release 1.50 and later.
"""

import ctypes
import functools
import os
from pathlib import Path

import numpy as np

# `en` is eSpeak's British English.
ACCENTS = {
    "en": ("en-us", "en-us", "en-us", "en", "en-gb-x-rp", "en-us-nyc", "en-gb-scotland", "en-029"),
    "hi": ("hi",),
}
# Left out: whispers, effects (Demonic, robots, announcer) and near copies of the voices below.
TRAIN_VARIANTS = [
    "m1", "m2", "m3", "m4", "m5", "m6", "m8", "f1", "f2", "f3", "f4", "Alex", "Alicia", "Andrea",
    "Denis", "Diogo", "Gene", "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mario", "Michael",
    "Mike", "Reed", "Storm", "adam", "anika", "antonio", "aunty", "belinda", "benjamin", "boris",
    "caleb", "croak", "david", "ed", "edward", "grandma", "grandpa", "gustave", "ian", "john",
    "kaukovalta", "klatt", "klatt3", "klatt4", "linda", "marcelo", "max", "michel", "miguel",
    "norbert", "pablo", "pedro", "quincy", "robert", "sandro", "shelby", "steph", "travis",
    "victor",
]  # fmt: skip
HELDOUT_VARIANTS = [
    "m7", "f5", "Annie", "Andy", "Nguyen", "iven", "klatt2", "paul", "rob", "zac", "steph2",
    "mike2",
]  # fmt: skip


class Speaker:
    """eSpeak NG behind ctypes. One a process: the library keeps its state in globals."""

    AUDIO_OUTPUT_SYNCHRONOUS = 2
    DONT_EXIT = 0x8000  # without it a missing data folder ends the process
    UTF8 = 1
    RATE, PITCH, RANGE, WORD_GAP = 1, 3, 4, 7  # espeak_PARAMETER

    def __init__(self):
        try:
            import espeakng_loader
        except ImportError:
            raise ModuleNotFoundError(
                "eSpeak NG is not installed (package espeakng-loader); "
                "install the extra that holds it: pip install .[quickstart]"
            ) from None
        data = espeakng_loader.get_data_path()
        self.variants = Path(data, "voices", "!v")
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.sample_rate_hz = self.library.espeak_Initialize(
            self.AUDIO_OUTPUT_SYNCHRONOUS, 0, os.fsencode(data), self.DONT_EXIT
        )
        if self.sample_rate_hz <= 0:
            raise RuntimeError(
                f"eSpeak NG cannot read its data in {data}; "
                "reinstall espeakng-loader, in a folder with a path under 150 characters"
            )
        self.pieces = []
        callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self.callback = callback(self._receive)  # kept: C holds only the bare pointer
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples, count, _events):
        if samples and count > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(
        self, text, voice, rate_wpm=170, pitch=50, pitch_range=50, word_gap=0, seed=1
    ) -> np.ndarray:
        """Samples of `text` in [-1, 1], float32 (L,), at `sample_rate_hz`.

        `voice` is an accent with a variant, `en-us+m3`; pitch and range run from 0 to 100, the word
        gap counts 10 ms. Raises ValueError for a voice that this eSpeak does not have.
        """
        _, _, variant = voice.partition("+")
        # eSpeak itself drops an unknown variant without a word.
        missing = variant and not (self.variants / variant).is_file()
        if missing or self.library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"eSpeak NG has no voice {voice!r}; see `espeak-ng --voices=variant`")
        for parameter, value in (
            (self.RATE, rate_wpm),
            (self.PITCH, pitch),
            (self.RANGE, pitch_range),
            (self.WORD_GAP, word_gap),
        ):
            self.library.espeak_SetParameter(parameter, int(value), 0)
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(seed))  # else the time of day
        self.pieces.clear()
        encoded = text.encode()
        self.library.espeak_Synth(
            encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, self.UTF8, None, None
        )
        samples = np.concatenate(self.pieces or [np.zeros(0, np.int16)])
        return samples.astype(np.float32) / 32768


@functools.cache
def the_speaker() -> Speaker:
    return Speaker()
