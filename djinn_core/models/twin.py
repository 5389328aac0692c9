"""The proof that a model can be served exactly: a small twin of it, stopped, resumed and streamed against the original.

Invariant: support is what the twin shows, never a list of names. The twin has the config's own architecture, two
layers (one of each kind of attention where there are two kinds), its ratio of query to KV heads, its position coding,
and a prompt longer than its sliding window. Every logit must equal the stock model's to the bit, and the stock model's
must repeat first.

Only what no run could show is refused by rule: recurrent state, and rotary frequencies that remember the longest
sequence seen.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from djinn_core.errors import UnsupportedModel
from djinn_core.models.export import fill_model
from djinn_core.models.identity import config_digest, dtype_name
from djinn_core.models.seeded import SeededSource

LAYERS = 2
PROMPT_TOKENS = 20
DECODE_TOKENS = 3
WINDOW = 8
_VOCABULARY = 128
_HEAD_DIM = 16
_WIDTH = 64
_PADDING = 5  # the second row of the batch begins with so many padding tokens

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
# What a modelling file raises when it is given a size or a call that it does not expect.
_DOES_NOT_RUN = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


@dataclass(frozen=True)
class Twin:
    """A twin and its task: a left-padded prompt of two rows, then given tokens one by one.

    Attributes:
        source: the twin's seeded weights, and its config.
        dtype: of weights and activations.
        input_ids, attention_mask: the prompt, [2, PROMPT_TOKENS].
        decode_ids: [2, DECODE_TOKENS]; pass i > 0 is fed column i - 1, whatever the logits say.
    """

    source: SeededSource
    dtype: torch.dtype
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    decode_ids: torch.Tensor

    @property
    def passes(self) -> int:
        """The prefill and each decode step."""
        return 1 + self.decode_ids.shape[1]

    def pass_inputs(self, index: int) -> dict[str, torch.Tensor]:
        """What pass `index` gives the model, as `generate` would: ids, the mask of all tokens so far, positions."""
        new = self.attention_mask.new_ones(self.attention_mask.shape[0], index)
        mask = torch.cat([self.attention_mask, new], dim=1)
        ids = self.input_ids if index == 0 else self.decode_ids[:, index - 1 : index]
        positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)[:, -ids.shape[1] :]
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


class TwinRunner(Protocol):
    """How the layers above run a twin, without proving the twin itself. Each call returns, per pass, the logits of the
    last position, [2, vocab], asked for as `generate` asks (`logits_to_keep=1`)."""

    def stream(self, twin: Twin) -> Sequence[torch.Tensor]:
        """All passes with every layer streamed through a ring, none resident."""
        ...

    def stop(self, twin: Twin, *, at_pass: int, after_layer: int) -> Sequence[torch.Tensor]:
        """All passes in a session; pass `at_pass` is stopped after layer `after_layer` (1 to the number of layers),
        swapped out and resumed."""
        ...


@dataclass(frozen=True)
class Verdict:
    """A proof that was given: what was run, and how often it was equal.

    Attributes:
        digest: of the config that was asked about.
        dtype: of the twin.
        comparisons: how many logit tensors were compared; all were equal to the bit.
    """

    digest: str
    dtype: str
    comparisons: int


_verdicts: dict[tuple[str, torch.dtype], Verdict | UnsupportedModel] = {}
_verdicts_lock = threading.RLock()


def prove(config: PretrainedConfig, dtype: torch.dtype, runner: TwinRunner) -> Verdict:
    """Show that Djinn serves models of `config` exactly, once per config and dtype in a process.

    Raises:
        UnsupportedModel: what differs, in which pass and after which layer; or why no run was tried.
    """
    key = (config_digest(config), dtype)
    with _verdicts_lock:
        if key not in _verdicts:
            try:
                _verdicts[key] = _prove(config, dtype, runner)
            except UnsupportedModel as refusal:
                _verdicts[key] = refusal
        verdict = _verdicts[key]
    if isinstance(verdict, UnsupportedModel):
        raise UnsupportedModel(str(verdict)) from verdict
    return verdict


def _prove(config: PretrainedConfig, dtype: torch.dtype, runner: TwinRunner) -> Verdict:
    refuse_by_rule(config)
    kind = config.model_type
    try:
        twin = make_twin(config, dtype)
        reference, again = stock_logits(twin), stock_logits(twin)
    except _DOES_NOT_RUN as error:
        raise UnsupportedModel(f"{kind}: its two-layer twin does not run in transformers itself: {error}") from error
    if any(logits.isnan().any() for logits in reference):
        raise UnsupportedModel(f"{kind}: the stock twin answers NaN; look for a number in its config that cannot be")
    if not all(map(torch.equal, reference, again)):
        raise UnsupportedModel(f"{kind}: the stock twin does not repeat itself in {dtype_name(dtype)}")
    runs = [("streamed", lambda: runner.stream(twin))]
    for at_pass in (0, twin.passes - 1):
        for layer in range(1, twin.source.config.num_hidden_layers + 1):
            what = f"stopped after layer {layer} of {'the prefill' if at_pass == 0 else f'decode step {at_pass}'}"
            runs.append((what, lambda p=at_pass, n=layer: runner.stop(twin, at_pass=p, after_layer=n)))
    for what, run in runs:
        try:
            logits = run()
        except _DOES_NOT_RUN as error:
            raise UnsupportedModel(f"{kind}: its two-layer twin, {what}, fails: {error}") from error
        _compare(kind, what, reference, logits)
    return Verdict(config_digest(config), dtype_name(dtype), len(runs) * len(reference))


def _compare(kind: str, what: str, reference: Sequence[torch.Tensor], logits: Sequence[torch.Tensor]) -> None:
    if len(logits) != len(reference):
        raise UnsupportedModel(f"{kind}: its two-layer twin, {what}, ran {len(logits)} of {len(reference)} passes")
    for index, (expected, got) in enumerate(zip(reference, logits, strict=True)):
        where = f"{kind}: its two-layer twin, {what}, differs from the stock model in pass {index}"
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise UnsupportedModel(f"{where}: {got.dtype} {tuple(got.shape)}, not {tuple(expected.shape)}")
        got = got.to(expected.device)
        if not torch.equal(got, expected):
            off = (got.double() - expected.double()).abs()
            raise UnsupportedModel(
                f"{where}: {int((got != expected).sum())} of {got.numel()} logits, by up to {off.max().item():.3g}"
            )


def refuse_by_rule(config: PretrainedConfig) -> None:
    """Refuse, by name, models whose state is not a KV cache with a length.

    Raises:
        UnsupportedModel: the config's name, and what it keeps.
    """
    text = config.get_text_config()
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    kinds = {*(getattr(text, "layer_types", None) or ()), *(getattr(text, "layers_block_type", None) or ())}
    other = sorted(kinds - _ATTENTION - {"attention"})
    if getattr(model_class, "_is_stateful", False) or other:
        what = f" in its {', '.join(other)} layers" if other else ""
        raise UnsupportedModel(
            f"{config.model_type}: it keeps recurrent or compressed state{what} besides a KV cache, which is "
            "overwritten in place: a pass that stopped at a layer could not be resumed or forked exactly"
        )
    for rope in _rope_parameters(text):
        if rope.get("rope_type") == "dynamic":
            raise UnsupportedModel(
                f"{config.model_type}: dynamic rotary scaling keeps the frequencies of the longest sequence seen, "
                "so that one session would change another"
            )


def _rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The config's rotary settings: one dict, or one for each kind of attention."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of `config` with two layers and small sizes; what decides the computation's structure is kept."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    group = min(max(heads // kv_heads, 1), 8)
    derived = isinstance(getattr(type(text), "head_dim", None), property)
    own_head_dim = None if derived else getattr(text, "head_dim", None)
    head_dim = own_head_dim or text.hidden_size // heads
    per_dimension = any(isinstance(value, list) for rope in _rope_parameters(text) for value in rope.values())
    new_head_dim = head_dim if per_dimension else min(head_dim, _HEAD_DIM)
    new_kv_heads = min(kv_heads, max(2, _WIDTH // (new_head_dim * group)))
    sizes: dict[str, Any] = {
        "num_hidden_layers": LAYERS,
        "vocab_size": _VOCABULARY,
        "num_attention_heads": new_kv_heads * group,
        "num_key_value_heads": new_kv_heads,
        "hidden_size": new_kv_heads * group * new_head_dim,
    }
    if own_head_dim is not None:
        sizes["head_dim"] = new_head_dim
    for name, limit in {
        "intermediate_size": 3 * _WIDTH,
        "n_inner": 3 * _WIDTH,
        "ffn_dim": 3 * _WIDTH,
        "moe_intermediate_size": _WIDTH,
        "shared_expert_intermediate_size": _WIDTH,
        "num_experts": 8,
        "num_local_experts": 8,
        "n_routed_experts": 8,
        "rotary_dim": new_head_dim,  # GPT-J
    }.items():
        value = getattr(text, name, None)
        if isinstance(value, int):
            sizes[name] = min(value, limit)
    if getattr(text, "word_embed_proj_dim", None) is not None:  # OPT: projects only where the two differ
        same = text.word_embed_proj_dim == text.hidden_size
        sizes["word_embed_proj_dim"] = sizes["hidden_size"] if same else _WIDTH // 2
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(text, name, None):
            sizes[name] = min(getattr(text, name), WINDOW)
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(text, name, None):
            sizes[name] = _two_kinds(getattr(text, name))
    for name, value in sizes.items():
        if hasattr(text, name):
            setattr(text, name, value)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, None)
    return small


def _two_kinds(kinds: Sequence[str]) -> list[str]:
    """Two layers' kinds, both that occur where there are two."""
    distinct = list(dict.fromkeys(kinds))
    return (distinct if len(distinct) > 1 else list(kinds))[:LAYERS]


def make_twin(config: PretrainedConfig, dtype: torch.dtype) -> Twin:
    """The twin of `config` and its task, the same in every process."""
    small = shrink(config)
    small.get_text_config().initializer_range = 0.1  # wide enough for every layer to move the logits
    generator = torch.Generator().manual_seed(20)
    ids = torch.randint(0, _VOCABULARY, (2, PROMPT_TOKENS + DECODE_TOKENS), generator=generator)
    mask = torch.ones(2, PROMPT_TOKENS, dtype=torch.long)
    mask[1, :_PADDING] = 0
    return Twin(SeededSource(small, dtype=dtype), dtype, ids[:, :PROMPT_TOKENS], mask, ids[:, PROMPT_TOKENS:])


def stock_model(twin: Twin) -> torch.nn.Module:
    """The twin as transformers itself builds it, on the CPU, filled with the twin's weights."""
    model = AutoModelForCausalLM.from_config(twin.source.config, dtype=twin.dtype).eval().requires_grad_(False)
    fill_model(model, twin.source)
    return model


def stock_logits(twin: Twin) -> list[torch.Tensor]:
    """The stock model's logits of the last position in every pass, with its stock cache."""
    return run_passes(stock_model(twin), twin)


def run_passes(model: torch.nn.Module, twin: Twin) -> list[torch.Tensor]:
    """All passes of the twin's task on `model`, with a stock cache: the last position's logits of each."""
    accepted = inspect.signature(model.forward).parameters
    cache = DynamicCache(config=model.config)
    logits = []
    with torch.inference_mode():
        for index in range(twin.passes):
            inputs = {"logits_to_keep": 1, **twin.pass_inputs(index)}
            inputs = {name: value for name, value in inputs.items() if name in accepted}
            logits.append(model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1].clone())
    return logits
