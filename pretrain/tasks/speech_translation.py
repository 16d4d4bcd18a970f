"""Speech translation: a recording's words in another language are told one by one."""

from __future__ import annotations

from dataclasses import replace

from pretrain.tasks.transcription import TRANSCRIPTION

SPEECH_TRANSLATION = replace(
    TRANSCRIPTION, name="speech_translation", summary="tell a recording's translation"
)
