"""A training stage's state on disk: weights, their running average, the optimiser's moments and the step reached."""

import math
from pathlib import Path

import torch


class Trainee:
    """Modules trained together. Everything that decides the next step is in its file, so a stage stopped at any
    step goes on to the same numbers: batches and noise are drawn from the seed and the step's number.

    Args:
        path: file of the checkpoint; read here when it exists, so a new object is where the last one was.
        rate: the learning rate's height.
        num_steps: where the cosine of the learning rate ends, at 2 % of its height.
        average: decay of the running average of weights, or 0 for none.
    """

    def __init__(
        self,
        path: Path,
        modules: list[torch.nn.Module],
        *,
        rate: float,
        num_steps: int,
        average: float = 0.0,
    ) -> None:
        self._path, self._rate, self._num_steps, self._average = path, rate, num_steps, average
        self._modules = modules
        self._parameters = [each for module in self._modules for each in module.parameters()]
        self._optimiser = torch.optim.AdamW(self._parameters, rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.step = 0
        self._averages = [each.detach().clone() for each in self._parameters]
        if path.exists():
            self._load()

    @property
    def is_done(self) -> bool:
        return self.step >= self._num_steps

    def learn(self, loss: torch.Tensor) -> None:
        """One step down the loss's gradient, whose norm is cut to 1."""
        warmup = min(1.0, (self.step + 1) / 100)
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * min(1.0, self.step / self._num_steps))) / 2
        for group in self._optimiser.param_groups:
            group["lr"] = self._rate * warmup * cosine
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimiser.step()
        if self._average:
            # The average forgets its start: early on it spans only a tenth of the steps so far.
            weight = 1 - min(self._average, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self._averages, [each.detach() for each in self._parameters], weight)
        self.step += 1

    def save(self) -> None:
        """Write the checkpoint by rename, so a kill leaves the old one or the new one."""
        state = {
            "step": self.step,
            "modules": [module.state_dict() for module in self._modules],
            "averages": self._averages,
            "optimiser": self._optimiser.state_dict(),
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self._path)

    def _load(self) -> None:
        state = torch.load(self._path, weights_only=True)
        self.step = state["step"]
        for module, weights in zip(self._modules, state["modules"], strict=True):
            module.load_state_dict(weights)
        self._averages = state["averages"]
        self._optimiser.load_state_dict(state["optimiser"])

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the running average in the modules' place. Not to be trained on afterwards."""
        for each, average in zip(self._parameters, self._averages, strict=True):
            each.copy_(average)
