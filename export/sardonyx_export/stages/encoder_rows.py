"""What an encoder's export is tried with: fixed texts, and the rows that its own tokeniser makes of them."""

import json
from collections.abc import Sequence

import tokenizers

from sardonyx_export.errors import ExportError
from sardonyx_export.stages.encoder_reference import EncodedRow

TEXTS = (
    "The ferry leaves at seven.",
    "A small brown dog sleeps under the kitchen table while rain falls on the roof and nobody is in a hurry.",
    "How do I reset the password of my account when I no longer have the phone that receives the code?",
    "Die Bäckerei an der Ecke öffnet um sechs Uhr, doch das Brot ist erst gegen halb sieben fertig.",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2\n",
    "今日は天気がいいので、川まで歩きました。",
    "Prices rose by 2.4 % in March, less than in February (3.1 %), mainly because heating oil became cheaper.",
    "Le musée est fermé le mardi; les autres jours, il ouvre à dix heures et l'entrée est libre après seize heures.",
)
LONG_TEXT = (
    "The report begins with the harbour, where the old cranes still stand, and goes on to the mills along the river. "
    "Each chapter lists what was built, who paid for it and what became of it after the railway came. "
)
LONGEST_ROW = 512
"""Tokens of the long row at most."""
QUERY = "When does the ferry leave?"
"""What rerankers are asked about each text."""


def tokenizer_text(data: bytes, *, lowercases: bool) -> bytes:
    """A ``tokenizer.json`` without truncation and padding, which are the server's matter.

    Args:
        data: the checkpoint's.
        lowercases: put texts into small letters before anything else.
    """
    facts = json.loads(data)
    facts["truncation"] = facts["padding"] = None
    if lowercases:
        lower = {"type": "Lowercase"}
        own = facts.get("normalizer")
        facts["normalizer"] = lower if own is None else {"type": "Sequence", "normalizers": [lower, own]}
    return json.dumps(facts, ensure_ascii=False).encode()


class Rows:
    """Makes rows of texts.

    Args:
        data: ``tokenizer.json``, as `tokenizer_text` makes it.
        max_model_len: tokens of a row at most.
        vocab_size: of the model.

    Raises:
        ExportError: it is no tokenizer, or gives tokens that the model has not.
    """

    def __init__(self, data: bytes, *, max_model_len: int, vocab_size: int) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception, whatever is wrong
            raise ExportError(f"cannot be loaded: {error}", file="tokenizer.json") from error
        self.max_tokens = min(max_model_len, LONGEST_ROW)
        """At which texts are cut."""
        self._tokenizer.enable_truncation(self.max_tokens)
        self._vocab_size = vocab_size

    def batches(self, *, are_pairs: bool) -> list[tuple[str, list[str], list[EncodedRow]]]:
        """Three shapes: what each is, its texts and its rows. One short text, several lengths, and the longest one."""
        long_text = LONG_TEXT * (1 + 8 * self.max_tokens // len(LONG_TEXT))
        shapes = [("one short text", [TEXTS[0]]), (f"{len(TEXTS)} texts of several lengths", list(TEXTS))]
        shapes.append((f"one text of up to {self.max_tokens} tokens", [long_text]))
        return [(what, texts, [self._row(text, are_pairs) for text in texts]) for what, texts in shapes]

    def _row(self, text: str, is_pair: bool) -> EncodedRow:
        encoding = self._tokenizer.encode(QUERY, text) if is_pair else self._tokenizer.encode(text)
        ids: Sequence[int] = encoding.ids
        if not ids:
            raise ExportError("turns text into no tokens", file="tokenizer.json")
        if max(ids) >= self._vocab_size:
            raise ExportError(f"gives token {max(ids):,}; the model has {self._vocab_size:,}", file="tokenizer.json")
        return EncodedRow(token_ids=ids, token_type_ids=encoding.type_ids if any(encoding.type_ids) else None)
