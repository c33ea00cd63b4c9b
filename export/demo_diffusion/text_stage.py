"""The text encoder's own training: say from the text's last states what the caption asks for.

Cross attention then starts from states that already bind colours to shapes, which is what a UNet learns slowest.
"""

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from demo_diffusion.captions import Asked
from demo_diffusion.model import MAX_TOKENS, TEXT_WIDTH
from demo_diffusion.scenes import COLOURS, RELATIONS, SHAPES

_ANSWERS: tuple[tuple[str | None, ...], ...] = (
    (*SHAPES, None),
    (*COLOURS, None),
    ("small", "big", None),
    (*SHAPES, None),
    (*COLOURS, None),
    ("small", "big", None),
    (*RELATIONS, None),
    (*COLOURS, None),
)
"""Shape, colour, size of the first thing and of the second; relation; background."""


class Questions(torch.nn.Module):
    """One linear head over the states after the text's end; used in this stage only."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(TEXT_WIDTH, sum(len(each) for each in _ANSWERS))

    def forward(self, states: torch.Tensor) -> list[torch.Tensor]:
        return list(self.head(states).split([len(each) for each in _ANSWERS], dim=-1))


def tokenise(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """(n, 32) int64, padded as the pipeline pads."""
    return tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids


def answers(asked: list[Asked]) -> torch.Tensor:
    """The right answers' numbers, (n, 8) int64."""
    rows = []
    for each in asked:
        things = [(thing.shape, thing.colour, thing.size) for thing in each.things]
        first, second = things if len(things) == 2 else (*things, (None, None, None))
        said = (*first, *second, each.relation, each.background)
        rows.append([choices.index(word) for choices, word in zip(_ANSWERS, said, strict=True)])
    return torch.tensor(rows)


def text_loss(
    text_encoder: CLIPTextModel, questions: Questions, tokens: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Mean cross entropy at the last place, which is padding or the text's end, and the share of captions read well."""
    states = text_encoder(tokens).last_hidden_state[:, -1]
    guesses = questions(states)
    losses = [torch.nn.functional.cross_entropy(guess, right[:, place]) for place, guess in enumerate(guesses)]
    hits = torch.stack([guess.argmax(-1) == right[:, place] for place, guess in enumerate(guesses)])
    return torch.stack(losses).mean(), float(hits.all(dim=0).float().mean())
