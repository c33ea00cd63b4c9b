"""What the logits of a Whisper decoder say: tokens, languages, and whether anybody speaks.

Floor 3. Pure numpy, for runners on every device.
"""

import math
from collections.abc import Sequence

import numpy as np

from sardonyx import core
from sardonyx.core import BatchRow
from sardonyx.repository.families import Whisper
from sardonyx.runners.speech_sampler import SpeechSampler, log_sum_exp, probability
from sardonyx.speech import Floats, SpeechOutput, SpeechRequest, SpeechTask


class SpeechReader:
    """Reads the logits of one model. Used by one thread."""

    def __init__(self, model: Whisper) -> None:
        self._model = model
        self._sampler = SpeechSampler(model)
        self._languages = np.array(list(model.language_ids.values()), np.intp)

    def wanted(self, row: BatchRow) -> list[int]:
        """Positions among the row's new tokens whose logits `read` looks at, at most two.

        The last one; of a row that begins also the start token's, which tells whether anybody speaks.
        """
        last = row.num_new_tokens - 1
        if row.sequence.num_computed_tokens:
            return [last]
        start = row.sequence.token_ids.index(self._model.start_id)
        return [start] if start == last else [start, last]

    def read(
        self, rows: Sequence[BatchRow], wanted: Sequence[Sequence[int]], logits: Floats, firsts: Sequence[int]
    ) -> SpeechOutput:
        """A token for each row, or the languages.

        Args:
            rows: of the step.
            wanted: of each, as `wanted` gave them.
            logits: (N, V), changed in place.
            firsts: where each row's begin.
        """
        output = SpeechOutput()
        for index, (row, places, first) in enumerate(zip(rows, wanted, firsts, strict=True)):
            last = logits[first + len(places) - 1]
            output.token_ids.append(None)
            output.logprobs.append(0.0)
            output.no_speech_probs.append(None)
            output.language_probs.append({})
            if not math.isfinite(last.max()):
                output.failed[index] = "the model's output for this sound is not finite"
            elif request_of(row.sequence).task is SpeechTask.LANGUAGES:
                output.language_probs[index] = self._language_probs(last)
            else:
                if row.sequence.num_computed_tokens == 0:
                    output.no_speech_probs[index] = probability(logits[first], self._model.no_speech_id)
                output.token_ids[index], output.logprobs[index] = self._draw(row, last)
        return output

    def _draw(self, row: BatchRow, logits: Floats) -> tuple[int, float]:
        sequence, request = row.sequence, request_of(row.sequence)
        drawn = sequence.token_ids[sequence.num_prompt_tokens :]
        self._sampler.apply_rules(logits, drawn, has_timestamps=request.has_timestamps)
        return self._sampler.draw(logits, request.sampling.temperature, sequence.seed, len(sequence.token_ids))

    def _language_probs(self, logits: Floats) -> dict[int, float]:
        among = logits[self._languages]
        probs = np.exp(among - log_sum_exp(among))
        return dict(zip(self._languages.tolist(), probs.tolist(), strict=True))


def request_of(sequence: core.Sequence) -> SpeechRequest:
    """What a sequence of a `SpeechBatch` was made for."""
    assert isinstance(sequence.request, SpeechRequest)
    return sequence.request
