"""How the next token is chosen: transformers' own processors, in the order in which `generate` applies them.

Beam search, contrastive search, assisted generation and processors with a state of their own are not offered: a session
must be able to stop at any token and go on from a checkpoint, and their state is in nobody's checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from djinn_core.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How `generate` chooses tokens; the defaults are greedy.

    Attributes:
        do_sample: draw from the distribution instead of taking the most likely token.
        temperature, top_k, top_p: as in transformers' `generate`; used only with `do_sample`.
        repetition_penalty: as in `generate`.
        seed: starts the session's random stream anew; None goes on with it.
        eos_token_id: tokens that end a sequence; None takes the model's own, () none.
        pad_token_id: what follows an ended sequence; None takes the model's own, else the first end token.
        min_new_tokens: no sequence ends before.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        rules = {
            "temperature": (self.temperature > 0, "greater than 0"),
            "top_k": (isinstance(self.top_k, int) and self.top_k >= 0, "a whole number, 0 for no limit"),
            "top_p": (0 < self.top_p <= 1, "greater than 0, at most 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "greater than 0"),
            "min_new_tokens": (isinstance(self.min_new_tokens, int) and self.min_new_tokens >= 0, "0 or more"),
        }
        for name, (good, allowed) in rules.items():
            if not good:
                raise ConfigError(f"Sampling.{name} is {getattr(self, name)!r}; allowed is {allowed}")
        if not self.do_sample and (self.temperature != 1.0 or self.top_k or self.top_p != 1.0):
            raise ConfigError("temperature, top_k and top_p have no effect without do_sample=True")

    def end_tokens(self, model_default: object) -> tuple[int, ...]:
        """The ids that end a sequence, given the model's own setting."""
        chosen = model_default if self.eos_token_id is None else self.eos_token_id
        if chosen is None:
            return ()
        return tuple(chosen) if isinstance(chosen, list | tuple) else (int(chosen),)

    def processors(self, prompt_length: int, end_tokens: tuple[int, ...], device: torch.device) -> LogitsProcessorList:
        """The processors, in `generate`'s order."""
        chosen = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            chosen.append(RepetitionPenaltyLogitsProcessor(penalty=self.repetition_penalty))
        if self.min_new_tokens and end_tokens:
            chosen.append(
                MinNewTokensLengthLogitsProcessor(
                    prompt_length, self.min_new_tokens, list(end_tokens), device=str(device)
                )
            )
        if self.do_sample:
            if self.temperature != 1.0:
                chosen.append(TemperatureLogitsWarper(self.temperature))
            if self.top_k:
                chosen.append(TopKLogitsWarper(top_k=self.top_k))
            if self.top_p < 1.0:
                chosen.append(TopPLogitsWarper(top_p=self.top_p))
        return chosen
