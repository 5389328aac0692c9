"""Choosing the next token, one at a time, so that generation can stop between any two."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from djinn_core.sessions.checkpoint import Story
from djinn_core.sessions.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Chooser:
    """Chooses tokens from a story's logits as `model.generate` does."""

    def __init__(
        self, model: PreTrainedModel, sampling: Sampling, story: Story, generator: torch.Generator | None
    ) -> None:
        config = model.generation_config
        self._ends = sampling.end_tokens(config.eos_token_id)
        pad = sampling.pad_token_id if sampling.pad_token_id is not None else config.pad_token_id
        self._pad = pad if pad is not None else (self._ends[0] if self._ends else 0)
        device = story.logits.device
        self._end_ids = torch.tensor(self._ends, device=device)
        known = sum(ids.shape[1] for ids in story.ids) + (story.pending is not None)
        self._processors = sampling.processors(known, self._ends, device)
        self._sample = sampling.do_sample
        self._generator = generator

    def any_unfinished(self, story: Story) -> bool:
        """Some sequence goes on. Asks the device only where sequences can end."""
        return not self._ends or story.unfinished is None or bool(story.unfinished.any())

    def choose(self, story: Story) -> tuple[Story, torch.Tensor]:
        """The story with its next token [B, 1] pending, and that token."""
        scores = story.logits.to(copy=True, dtype=torch.float32)
        if self._processors:
            scores = self._processors(torch.cat(story.ids, dim=1).to(scores.device), scores)
        if self._sample:
            odds = torch.nn.functional.softmax(scores, dim=-1)
            token = torch.multinomial(odds, num_samples=1, generator=self._generator).squeeze(1)
        else:
            token = torch.argmax(scores, dim=-1)
        unfinished = story.unfinished
        if self._ends:
            if unfinished is None:
                unfinished = torch.ones_like(token)
            token = token * unfinished + self._pad * (1 - unfinished)
            unfinished = unfinished & ~torch.isin(token, self._end_ids)
        return replace(story, pending=token[:, None], unfinished=unfinished), token[:, None]
