"""Seeded weights: the same bytes always, and numbers that a deep model can run on."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM

from djinn_core.errors import WeightsError
from djinn_core.models import pieces, seeded
from djinn_core.models.export import fill_model
from djinn_core.models.source import open_source


def digest(tensor):
    return hashlib.blake2b(tensor.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


def normal(count, dtype=torch.float32, seed=0, name="w", std=0.02):
    out = torch.empty(count, dtype=dtype)
    seeded.fill_normal(out, seed=seed, name=name, std=std)
    return out


@pytest.mark.parametrize(
    ("dtype", "golden"),
    [(torch.float32, "62a7616b070c8fd0"), (torch.float16, "faddc74f337c13da"), (torch.bfloat16, "4123c1205079824d")],
)
def test_bytes_never_change(dtype, golden):
    """These digests are the promise. If they change, published results no longer name the weights they ran on."""
    assert digest(normal(seeded.CHUNK_VALUES + 12345, dtype)) == golden


def test_bytes_do_not_depend_on_threads_or_order(monkeypatch):
    source = open_source("tiny-llama", dtype="bfloat16")
    count = 3 * seeded.CHUNK_VALUES + 7
    alone = normal(count)

    def read(name):
        out = torch.empty(*source.meta(name)[:1], dtype=source.meta(name)[1])
        source.read_into(name, out)
        return name, digest(out)

    forwards = dict(map(read, source.names()))
    with ThreadPoolExecutor(8) as executor:
        backwards = dict(executor.map(read, reversed(source.names())))
        monkeypatch.setattr(pieces, "_executor", executor)
        many = normal(count)
    assert forwards == backwards
    assert torch.equal(alone, many)


def test_chunks_names_and_seeds_differ():
    size = seeded.CHUNK_VALUES
    both = normal(2 * size)
    assert torch.equal(both[:size], normal(size))
    draws = [both[:size], both[size:], normal(size, name="v"), normal(size, seed=1)]
    for i, a in enumerate(draws):
        for b in draws[i + 1 :]:
            assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.01


def test_dtypes_round_the_same_numbers():
    exact = normal(5000)
    assert torch.equal(normal(5000, torch.bfloat16), exact.bfloat16())
    assert torch.equal(normal(5000, torch.float16), exact.half())


def test_statistics():
    values = normal(1 << 20, std=0.5)
    assert abs(values.mean()) < 0.002
    assert values.std() == pytest.approx(0.5, rel=0.005)
    assert (values / 0.5).pow(4).mean() == pytest.approx(3, rel=0.02)


def test_norms_are_one_biases_are_small_and_residual_writers_shrink_with_depth():
    source = open_source("tiny-gpt2", dtype=torch.float32)
    read = {}
    for name in source.names():
        read[name] = torch.empty(source.meta(name)[0])
        source.read_into(name, read[name])
    layer = "transformer.h.0."
    assert torch.equal(read[layer + "ln_1.weight"], torch.ones(64))
    assert read[layer + "ln_1.bias"].abs().max() > 0
    assert read[layer + "attn.c_attn.weight"].std() == pytest.approx(0.12, rel=0.03)
    assert read[layer + "mlp.c_proj.weight"].std() == pytest.approx(0.12 / 8**0.5, rel=0.03)


def test_eighty_layers_stay_finite_in_fp16():
    config = open_source("tiny-llama").config
    config.num_hidden_layers = 80
    source = open_source(config, dtype=torch.float16)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    fill_model(model, source)
    with torch.inference_mode():
        hidden = model(torch.arange(32)[None], output_hidden_states=True).hidden_states
    assert all(torch.isfinite(h).all() for h in hidden)
    assert max(h.abs().max() for h in hidden) < 1000


def test_a_wrong_destination_is_refused():
    source = open_source("tiny-llama", dtype=torch.float16)
    name = "model.norm.weight"
    for wrong in (torch.empty(63, dtype=torch.float16), torch.empty(64), torch.empty(64, 2, dtype=torch.float16)[:, 0]):
        with pytest.raises(ValueError, match=name):
            source.read_into(name, wrong)


def test_other_dtypes_are_refused():
    with pytest.raises(WeightsError, match="float64"):
        open_source("tiny-llama", dtype=torch.float64)


def test_digest_tells_seeds_dtypes_and_configs_apart():
    config = open_source("tiny-llama").config
    config.rms_norm_eps = 1e-6
    sources = [
        open_source("tiny-llama", dtype="float16"),
        open_source("tiny-llama", dtype="bfloat16"),
        open_source("tiny-llama", dtype="float16", seed=1),
        open_source("tiny-llama-gqa", dtype="float16"),
        open_source(config, dtype="float16"),
    ]
    assert len({source.digest for source in sources}) == len(sources)
    assert sources[0].digest == open_source("tiny-llama", dtype="float16").digest


def test_a_failed_piece_is_raised_after_all_have_ended():
    ended = []

    def work(begin, end):
        if begin == 2:
            raise OSError("piece 1")
        ended.append((begin, end))

    with pytest.raises(OSError, match="piece 1"):
        pieces.each_piece(7, 2, work)
    assert (2, 4) not in ended
