"""Filling a gap between a prompt and its suffix, for models that were trained to.

Floor 5. Such models have three tokens of their own for it; editors (Continue, Zed, aider) send ``suffix`` and expect
the gap's text alone. A model without the tokens would write whatever it likes, so it is not asked.
"""

from sardonyx.errors import InvalidRequest, UnsupportedFeature
from sardonyx.processing.tokenizer import Tokenizer

_TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
)


def infill_prompt(prompt: object, suffix: str, tokenizer: Tokenizer) -> str:
    """The prompt that makes a model fill the gap, in prefix-suffix-middle order.

    Raises:
        InvalidRequest: the prompt is not a text.
        UnsupportedFeature: the model has no such tokens.

    Source: Bavarian et al., "Efficient Training of Language Models to Fill in the Middle" (arXiv:2207.14255), PSM.
    """
    tokens = next((row for row in _TOKENS if all(tokenizer.token_id(token) is not None for token in row)), None)
    if tokens is None:
        raise UnsupportedFeature("suffix: this model was not trained to fill a gap; leave it out", param="suffix")
    if not isinstance(prompt, str):
        raise InvalidRequest("suffix: needs a prompt that is one text", param="suffix")
    before, after, middle = tokens
    return f"{before}{prompt}{after}{suffix}{middle}"
