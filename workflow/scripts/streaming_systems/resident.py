"""The reference: a stock transformers model with its stock cache, wholly on the device, and what it answers.

Its tokens and logits are written once per run; every system is compared with them bit for bit. It must first repeat
itself: only then does "equal" mean equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from workflow.lib.harness import Experiment, Outcome
from workflow.lib.results import write_bytes
from workflow.scripts.streaming_systems.base import source_of, stock_model, weight_bytes


@dataclass(frozen=True)
class Answers:
    """What a model answers to the prompt: last logits [1, V] without a cache, and with one, then one row per token.

    Attributes:
        pass_logits: of the prompt, no cache.
        logits: [1 + n, V]: of the prompt with a cache, then of each decoded token.
        tokens: [1 + n], the greedy choice from each of these rows.
    """

    pass_logits: torch.Tensor
    logits: torch.Tensor
    tokens: torch.Tensor

    def same(self, other: Answers) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.tensors().values(), other.tensors().values(), strict=True))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"pass_logits": self.pass_logits, "logits": self.logits, "tokens": self.tokens}


def seeded_prompt(vocab_size: int, tokens: int, seed: int, device: torch.device) -> torch.Tensor:
    """Token ids [1, tokens], the same for every system."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (1, tokens), generator=generator).to(device)


def plain_pass(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    """The logits [1, V] of the prompt's last position, without a cache."""
    return model(input_ids=prompt, use_cache=False, logits_to_keep=1).logits[:, -1]


def prefill(model: Any, prompt: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The same with a cache, and the cache."""
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], out.past_key_values


def decode(model: Any, logits: torch.Tensor, cache: Any, count: int) -> list[torch.Tensor]:
    """Logits of `count` greedy tokens after `logits`; nothing here waits for the device."""
    rows = []
    for _ in range(count):
        token = logits.argmax(-1, keepdim=True)
        out = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = out.logits[:, -1]
        rows.append(logits)
    return rows


def answers(model: Any, prompt: torch.Tensor, count: int) -> Answers:
    """One pass without a cache, one prefill, `count` tokens."""
    plain = plain_pass(model, prompt)
    first, cache = prefill(model, prompt)
    rows = torch.cat([first, *decode(model, first, cache, count)])
    return Answers(plain.cpu(), rows.cpu(), rows.argmax(-1).cpu())


def run(exp: Experiment, out: Path) -> None:
    """Answer twice with the resident model, show that it repeats itself, and write what it answered to `out`.

    Raises:
        Outcome: the device cannot hold the model; with the bytes.
    """
    config = exp.config
    source = source_of(config)
    needed_bytes = weight_bytes(source) + config["activation_bytes"]  # the KV cache of one prompt is among the latter
    if exp.is_gpu:
        free_bytes, _ = torch.cuda.mem_get_info()
        if needed_bytes > free_bytes:
            raise Outcome(
                "unsupported",
                f"no resident reference: it needs {needed_bytes:,} bytes on the device, have {free_bytes:,}",
            )
    with exp.progress.task("load the reference"):
        model = stock_model(source, exp.device)
    prompt = seeded_prompt(source.config.vocab_size, config["prompt_tokens"], config["seed"], torch.device(exp.device))
    with torch.inference_mode(), exp.progress.task("answer twice"):
        first, second = (answers(model, prompt, config["decode_tokens"]) for _ in range(2))
    exp.result.weights = {"kind": source.kind, "digest": source.digest, "size_bytes": weight_bytes(source)}
    exp.result.sample("reference_tokens", len(first.tokens), "tokens")
    exp.result.check("reference_repeats", first.same(second))
    write(out, {name: tensor.contiguous() for name, tensor in first.tensors().items()}, source.digest)


def write(out: Path, tensors: dict[str, torch.Tensor], weights_digest: str) -> None:
    """Answers; a run that may not come to them writes none first, since the rule promises the file."""
    write_bytes(out, save(tensors, metadata={"weights": weights_digest}))


def read(path: Path, weights_digest: str) -> Answers:
    """The reference's answers.

    Raises:
        Outcome: they are missing, the reference has none, or they are of other weights.
    """
    if not path.is_file():
        raise Outcome("inconclusive", f"no reference: {path} is missing; run the system `reference` first")
    with safe_open(path, framework="pt") as file:
        if not file.keys():
            raise Outcome("inconclusive", f"the reference has no answers: {path.with_suffix('.json')} says why")
        if (file.metadata() or {}).get("weights") != weights_digest:
            raise Outcome("inconclusive", f"{path} was made with other weights; run the system `reference` again")
        return Answers(*(file.get_tensor(name) for name in ("pass_logits", "logits", "tokens")))
