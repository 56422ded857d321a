"""A corpus that a synthesiser speaks: texts, a voice, a room and a microphone."""
