"""Sound: files to samples, samples to features."""

from .files import audio_duration, load_audio

__all__ = ["audio_duration", "load_audio"]
