"""A wrong setting is refused before anything runs, with its key and what is allowed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from djinn_core.certificate import THRESHOLDS
from workflow.lib import config, models
from workflow.lib.config import PRESETS, SettingsError, auto_run, canonical, load_config, section

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("run", PRESETS)
def test_every_preset_is_allowed(run: str) -> None:
    settings = load_config(run)
    assert settings["run"] == run
    assert {"certify", "streaming", "resume", "pressure"} <= settings.keys()


def test_a_preset_may_measure_some_experiments_only() -> None:
    settings = load_config("h200_70b")
    assert section(settings, "streaming")["model"]["name"] == "llama-2-70b"
    with pytest.raises(SettingsError, match=r"h200_70b: .* no section 'resume'; it measures: certify, streaming"):
        section(settings, "resume")
    assert "h200_70b" not in PRESETS  # taken by name only


def test_a_preset_without_an_experiment_is_a_graph_without_it() -> None:
    command = [sys.executable, "-m", "snakemake", "-n", "--quiet", "host", "--config", "run=h200_70b", "--"]
    done = subprocess.run([*command, "all"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "streaming_system" in done.stdout and "fig5" in done.stdout
    assert not any(name in done.stdout for name in ("resume_method", "pressure_djinn", "fig6", "fig7"))
    refused = subprocess.run(
        [*command, "paper_figures/fig7.pdf"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert refused.returncode != 0
    assert "this preset has no section 'resume'; it measures: certify, streaming" in refused.stdout + refused.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("streaming.capp_bytes=8", ["streaming.capp_bytes: unknown key", "did you mean cap_bytes"]),
        ("streaming.cap=8", ["streaming.cap: unknown key", "the unit belongs to the name: cap_bytes"]),
        ("streaming.cap_bytes=8GB", ["streaming.cap_bytes: '8GB' is not of type 'integer'"]),
        ("streaming.cap_bytes=0", ["streaming.cap_bytes: 0 is less than the minimum of 1"]),
        ("resume.layers=[1, 11]", ["resume.layers: layer 11 is out of range", "small-llama allows 1 to 10"]),
        ("resume.layers=[0]", ["resume.layers.0: 0 is less than the minimum of 1"]),
        ("pressure.layer=12", ["pressure.layer: layer 12 is out of range", "allows 1 to 10"]),
        (
            "streaming.chunk_bytes.djinn_chunk16mib=4958721",
            [
                "streaming.chunk_bytes.djinn_chunk16mib",
                "4,958,721 bytes is larger than a ring slot",
                "at most 4,958,720",
            ],
        ),
        ("resume.prompt_tokens=2048", ["resume.prompt_tokens: 2048 leaves no room", "up to 2047"]),
        ("streaming.model.name=llama", ["streaming.model.name: no architecture 'llama'", "allowed:", "small-llama"]),
        (
            "streaming.model.path=no/such/folder",
            [
                "presets/cpu.yaml: streaming.model.path: 'no/such/folder': no such folder, and no hub id either",
                "allowed: null, a folder with config.json and safetensors, or a hub id (owner/name) in the local cache",
            ],
        ),
        (
            "resume.model.path=nobody/none",
            ["resume.model.path: 'nobody/none': ", "not in the local Hugging Face cache"],
        ),
        ("pressure.model.path=~nobody-here/x", ["pressure.model.path: '~nobody-here/x': ", "allowed: null"]),
        ("streaming.model.path=config/models", ["streaming.model.path: ", "neither model.safetensors nor", "allowed:"]),
        ("streaming.model.path=config/models/gpt2.json", ["streaming.model.path: ", "no hub id either"]),
        ("streaming.model.path=''", ["streaming.model.path: "]),
        ("streaming.model.path=7", ["streaming.model.path: 7 is not of type"]),
        ("streaming.runs=2", ["streaming.runs: 2 is less than the minimum of 3"]),
        ("machine.limits.drift_allowed=2", ["machine.limits.drift_allowed: 2 is greater than the maximum of 1"]),
        ("streaming.pass_limit_s=.nan", ["streaming.pass_limit_s: nan is not of type 'number'"]),
        ("streaming.switch_interval_s=.inf", ["streaming.switch_interval_s: inf is not of type 'number'"]),
        ("streaming.cap_bytes=40000000.0", ["streaming.cap_bytes: 40000000.0 is not of type 'integer'"]),
        ("nowhere.x=1", ["there is no section 'nowhere'"]),
        ("streaming", ["wanted section.key=value"]),
        ("=1", ["--set =1: wanted section.key=value"]),
        ("streaming.seed=[", ["--set streaming.seed=[, line 1: while parsing a flow node"]),
        ("streaming.seed=2026-99-99", ["--set streaming.seed=2026-99-99: not YAML: month must be in 1..12"]),
        ("streaming={1: 2}", ["--set streaming={1: 2}, line 1: the key 1 is not text"]),
        ("streaming.model={seed: 1, seed: 2}", ["line 1: seed: given twice"]),
        ("run=h200", ["--set run=h200: the preset is named by --run"]),
        (
            "streaming.expected_by_system={djinn_chunk16: {time_s: 3}}",
            [
                "presets/cpu.yaml: streaming.expected_by_system.djinn_chunk16: no such system",
                "did you mean djinn_chunk16mib?; allowed: reference, accelerate_cpu_offload, ",
            ],
        ),
        ("resume.expected_by_system={reference: {time_s: 3}}", ["allowed: eager, recompute, manual_offload_pageable"]),
        (
            "pressure.expected_by_system={recompute: {time_s: 3}}",
            ["reference, eager, manual_offload, djinn, "],
        ),
    ],
)
def test_wrong_settings_are_refused(override: str, said: list[str]) -> None:
    with pytest.raises(SettingsError) as refusal:
        load_config("cpu", [override])
    for words in said:
        assert words in str(refusal.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the committed settings, to be made wrong."""
    return Path(shutil.copytree(ROOT / "config", tmp_path / "settings"))


WRONG_FILES = [
    (b"", "is empty, wanted a mapping"),
    (b"# nothing\n", "is empty, wanted a mapping"),
    (b"- machine\n", "holds a list, wanted a mapping"),
    (b"a: [\n", "line 2: while parsing a flow node"),
    (b"\xff\xfe", "not UTF-8: invalid start byte at byte 0"),
    (b"\0", "not YAML: unacceptable character"),
    (b"a: 2026-99-99", "not YAML: month must be in 1..12"),
    (b"a: " + b"[" * 5000, "nested too deeply"),
    (b"a: {b: 1,\n  b: 1}", "line 2: b: given twice, first in line 1"),
    (b"a: 1\nb:\n  3: 1\n", "line 3: the key 3 is not text"),
    (b"on: 1\n", "line 1: the key on is not text"),
    (b"[a]: 1\n", "line 1: the key a sequence is not text"),
]


@pytest.mark.parametrize("name", ["config.yaml", "presets/cpu.yaml"])
@pytest.mark.parametrize(("content", "said"), WRONG_FILES)
def test_a_file_that_holds_no_settings_is_refused(folder: Path, name: str, content: bytes, said: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(SettingsError) as refusal:
        load_config("cpu", folder=folder)
    assert str(refusal.value).startswith(str(folder / name)) and said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "config.yaml").unlink()
    with pytest.raises(SettingsError, match=r"config\.yaml: cannot be read: No such file"):
        load_config("cpu", folder=folder)


def test_a_key_given_twice_is_refused_with_both_lines(folder: Path) -> None:
    preset = folder / "presets" / "cpu.yaml"
    lines = preset.read_text().splitlines()
    first = lines.index("  decode_tokens: 8")
    preset.write_text("\n".join([*lines[: first + 1], "  decode_tokens: 9", *lines[first + 1 :]]))
    said = f"cpu.yaml, line {first + 2}: decode_tokens: given twice, first in line {first + 1}"
    with pytest.raises(SettingsError, match=said):
        load_config("cpu", folder=folder)


def test_a_key_may_come_again_over_one_that_was_merged(folder: Path) -> None:
    (folder / "x.yaml").write_text("a: &a {b: 1, c: 1}\nd:\n  <<: *a\n  b: 2\n")
    assert config.read_yaml(folder / "x.yaml")["d"] == {"b": 2, "c": 1}


def test_a_preset_does_not_name_a_run(folder: Path) -> None:
    preset = folder / "presets" / "cpu.yaml"
    preset.write_text("run: h200\n" + preset.read_text())
    with pytest.raises(SettingsError, match=r"cpu\.yaml: run: a preset's name is that of its file"):
        load_config("cpu", folder=folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        *WRONG_FILES[:5],
        (b"points: []", "points: [] should be non-empty"),
        (b"a: 1", "a: unknown key; allowed: points"),
        (b"points: [{live_layers: 1}]", "points.0: 'prefetch_layers' is a required property"),
        (
            b"points: [{prefetch_layers: a, live_layers: 1, reuse_layers: 0, persistence_numel: 1}]",
            "points.0.prefetch_layers: 'a' is not of type 'number'",
        ),
        (
            b"points: [{prefetch_layers: 1, live_layers: .inf, reuse_layers: 0, persistence_numel: 1}]",
            "points.0.live_layers: inf is not of type 'number'",
        ),
    ],
)
def test_a_wrong_grid_is_refused(folder: Path, content: bytes, said: str) -> None:
    grid = folder / "deepspeed_grid.yaml"
    grid.write_bytes(content)
    with pytest.raises(SettingsError) as refusal:
        config.read_grid(grid)
    assert str(refusal.value).startswith(str(grid)) and said in str(refusal.value)


def checkpoint(folder: Path, **fields: object) -> Path:
    """A folder that has what is looked for without reading weights."""
    folder.mkdir(parents=True)
    architecture = json.loads((ROOT / "config" / "models" / "small-llama.json").read_text())
    (folder / "config.json").write_text(json.dumps(architecture | fields))
    (folder / "model.safetensors").touch()
    return folder


def hub_checkpoint(cache: Path, **fields: object) -> None:
    """The hub id djinn/deep in a cache."""
    repository = cache / "models--djinn--deep"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    checkpoint(repository / "snapshots" / ("0" * 40), **fields)


def test_a_checkpoint_is_found_and_the_settings_are_held_to_its_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    checkpoint(tmp_path / "deep", num_hidden_layers=12)
    hub_checkpoint(tmp_path / "hub", num_hidden_layers=12)
    for path in (str(tmp_path / "deep"), "~/deep", "djinn/deep"):
        override = f"pressure.model.path={path}"
        assert load_config("cpu", [override, "pressure.layer=12"])["pressure"]["model"]["path"] == path
        with pytest.raises(SettingsError, match=r"layer 13 is out of range; .* allows 1 to 12"):
            load_config("cpu", [override, "pressure.layer=13"])


@pytest.mark.parametrize(
    ("text", "said"), [(None, "No such file"), ("{", "Expecting"), ("[]", "no `model_type`"), ("{}", "no `model_type`")]
)
def test_a_checkpoint_without_a_config_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    config_file = checkpoint(tmp_path / "broken") / "config.json"
    config_file.unlink() if text is None else config_file.write_text(text)
    with pytest.raises(SettingsError, match=f"streaming.model.path: .*{said}.*; allowed: null, a folder"):
        load_config("cpu", [f"streaming.model.path={tmp_path / 'broken'}"])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "llama"}, "`hidden_size` is missing; allowed: a whole number from 1"),
        ({"model_type": "gpt2", "n_embd": 8, "n_positions": 8}, "`n_layer` is missing"),
        ({"num_attention_heads": 0}, "`num_attention_heads` is 0; allowed"),
        ({"num_hidden_layers": "2"}, "`num_hidden_layers` is '2'; allowed"),
        ({"head_dim": [4]}, "`head_dim` is [4]; allowed"),
        ({"model_type": ["llama"]}, "`model_type` is ['llama'], which transformers does not know"),
        ({"model_type": "nope"}, "`model_type` is 'nope', which transformers does not know"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_its_field(tmp_path: Path, fields: dict, said: str) -> None:
    folder = checkpoint(tmp_path / "broken", **fields)
    if isinstance(fields.get("model_type"), str):  # nothing but these
        (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(SettingsError) as refusal:
        load_config("cpu", [f"streaming.model.path={folder}"])
    assert str(refusal.value).startswith(f"presets/cpu.yaml: streaming.model.path: '{folder}': ")
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_settings_are_read_without_torch(tmp_path: Path) -> None:
    hub_checkpoint(tmp_path)
    code = (
        "import sys; from workflow.lib.config import load_config; load_config('cpu'); "
        "assert not {'torch', 'huggingface_hub'} & set(sys.modules); "
        "load_config('cpu', ['streaming.model.path=djinn/deep']); assert 'torch' not in sys.modules"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=100)


def pipeline_in(folder: Path) -> None:
    """A pipeline of its own, to be made wrong."""
    for name in ("config", "djinn_core", "workflow"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", folder)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.yaml", b"a: [\n", "config.yaml, line 2: while parsing"),
        ("config.yaml", b"\xff", "config.yaml: not UTF-8"),
        ("deepspeed_grid.yaml", b"", "deepspeed_grid.yaml: is empty"),
        ("claims.yaml", b"", "config/claims.yaml: is empty"),
        ("claims.yaml", b"claims: [{id: a}]", "config/claims.yaml: $.claims[0]: 'sentence' is a required property"),
        ("presets/h200.yaml", b"machine: 3", "h200.yaml: machine.needs: wanted device_bytes and host_bytes"),
    ],
)
def test_the_pipeline_refuses_a_wrong_file(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    pipeline_in(tmp_path)
    (tmp_path / "config" / name).write_bytes(content)
    chosen = "auto" if name.startswith("presets") else "cpu"
    command = [sys.executable, "-m", "snakemake", "-n", "--config", f"run={chosen}", "--", "claims"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert refused.returncode != 0
    told = refused.stdout + refused.stderr
    assert "WorkflowError" in told and said in told


def test_the_pipeline_refuses_a_wrong_path_before_any_rule(tmp_path: Path) -> None:
    pipeline_in(tmp_path)
    preset = tmp_path / "config" / "presets" / "cpu.yaml"
    preset.write_text(preset.read_text().replace("small-llama, path: null", "small-llama, path: ./absent", 1))
    command = [sys.executable, "-m", "snakemake", "-n", "--config", "run=cpu", "--", "all"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert refused.returncode != 0
    assert (
        "cpu.yaml: streaming.model.path: './absent': no such folder, and no hub id either"
        in refused.stdout + refused.stderr
    )


def test_answers_that_are_gone_are_made_again_for_the_next_system(tmp_path: Path) -> None:
    pipeline_in(tmp_path)
    for name in ("certificate.json", "streaming/reference.json"):
        path = tmp_path / "results" / "cpu" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    command = [sys.executable, "-m", "snakemake", "-n", "--config", "run=cpu", "--"]
    command.append("results/cpu/streaming/djinn_ans.json")
    jobs = []
    for _ in range(2):
        planned = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
        jobs.append(re.findall(r"^(\w+) +\d+$", planned.stdout + planned.stderr, re.MULTILINE))
        (tmp_path / "results/cpu/streaming/reference.safetensors").touch()
    assert set(jobs[0]) == {"streaming_reference", "streaming_system", "total"}
    assert set(jobs[1]) == {"streaming_system", "total"}


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "presets").mkdir()
    (tmp_path / "config.yaml").write_text((ROOT / "config" / "config.yaml").read_text())
    text = (ROOT / "config" / "presets" / "cpu.yaml").read_text()
    (tmp_path / "presets" / "cpu.yaml").write_text(text.replace("  decode_tokens: 8\n", ""))
    with pytest.raises(SettingsError, match="streaming: 'decode_tokens' is a required property"):
        load_config("cpu", folder=tmp_path)


def test_a_key_that_was_misspelt_is_named_and_not_the_one_that_it_was_to_be(tmp_path: Path) -> None:
    (tmp_path / "presets").mkdir()
    (tmp_path / "config.yaml").write_text((ROOT / "config" / "config.yaml").read_text())
    text = (ROOT / "config" / "presets" / "cpu.yaml").read_text()
    (tmp_path / "presets" / "cpu.yaml").write_text(text.replace("  cap_bytes: 40_000_000\n", "  cap: 40_000_000\n"))
    with pytest.raises(SettingsError, match=r"streaming\.cap: unknown key, the unit belongs to the name: cap_bytes"):
        load_config("cpu", folder=tmp_path)


@pytest.mark.parametrize("given", ["rnu=cpu", "streaming={cap_bytes: 1}", "machine={limits: {copies: 3}}"])
def test_the_pipeline_refuses_what_it_would_not_read(given: str) -> None:
    command = [sys.executable, "-m", "snakemake", "-n", "--config", "run=cpu", given, "--", "certify"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert refused.returncode != 0
    assert f"--config {given.partition('=')[0]}: allowed: run;" in refused.stdout + refused.stderr


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(SettingsError, match="no preset 'b200'; allowed: cpu, h100, h200, h200_70b, l4"):
        load_config("b200")


@pytest.mark.parametrize("run", ["../presets/cpu", "a/b", "", ".", "cpu.yaml", "cpu\0", None, 3, ["cpu"]])
def test_only_a_name_is_a_preset(run: object) -> None:
    with pytest.raises(SettingsError, match=r"run: no preset .*; allowed: cpu, h100, h200, h200_70b, l4"):
        load_config(run)


def test_the_pipeline_refuses_a_path_for_a_run() -> None:
    command = [sys.executable, "-m", "snakemake", "-n", "--config", "run=../presets/cpu", "--", "certify"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert refused.returncode != 0
    assert "no preset '../presets/cpu'; allowed: cpu, h100," in refused.stdout + refused.stderr


def test_an_override_is_effective_and_recorded() -> None:
    settings = load_config("cpu", ["streaming.prompt_tokens=7"])
    own = section(settings, "streaming")
    assert own["prompt_tokens"] == 7
    assert own["overrides"] == ["streaming.prompt_tokens=7"]


def test_a_rules_parameter_changes_with_its_own_settings_only() -> None:
    plain, changed = load_config("cpu"), load_config("cpu")
    changed["resume"]["repeats"] += 1
    assert canonical(plain, "streaming") == canonical(changed, "streaming")
    assert canonical(plain, "resume") != canonical(changed, "resume")


def test_a_rules_parameter_changes_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edited architecture, or other weights in the same folder: a result of the model before is out of date."""
    monkeypatch.setattr(models, "ARCHITECTURES", tmp_path)
    (tmp_path / "mine.json").write_text('{"model_type": "llama", "rms_norm_eps": 1e-5}')
    settings = {"streaming": {"model": {"name": "mine", "path": None}}, "machine": {}, "certify": {}}
    seen = [canonical(settings, "streaming")]
    (tmp_path / "mine.json").write_text('{"model_type": "llama", "rms_norm_eps": 1e-3}')
    seen.append(canonical(settings, "streaming"))
    settings["streaming"]["model"]["path"] = str(checkpoint(tmp_path / "folder"))
    seen.append(canonical(settings, "streaming"))
    weights = next((tmp_path / "folder").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b"0")
    seen.append(canonical(settings, "streaming"))
    assert len(set(seen)) == 4 and seen[3] == canonical(settings, "streaming")


@pytest.mark.parametrize(("gpu_gb", "run"), [(0, "cpu"), (16, "cpu"), (24, "l4"), (85, "h100"), (150, "h200")])
def test_auto_takes_the_largest_that_fits(
    gpu_gb: int, run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(config, "first_gpu_bytes", lambda: gpu_gb * 10**9)
    monkeypatch.setattr(config.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**12 // 4096}.__getitem__)
    assert auto_run() == run
    assert ("no GPU preset fits" in capsys.readouterr().err) == (gpu_gb == 16), "a GPU is not left aside in silence"


def test_the_command_and_the_pipeline_hold_a_machine_to_the_same() -> None:
    assert load_config("h200")["certify"]["thresholds"] == THRESHOLDS


@pytest.mark.parametrize(
    ("override", "code", "said"),
    [("certify.x=1", 2, "certify.x: unknown key"), ("certify.disk_path=/nonexistent/folder", 1, "/nonexistent/folder")],
)
def test_a_script_ends_with_one_line(tmp_path: Path, override: str, code: int, said: str) -> None:
    out = tmp_path / "certificate.json"
    command = [
        sys.executable,
        "-m",
        "workflow.scripts.certify",
        "--run",
        "cpu",
        "--out",
        str(out),
        "--set",
        override,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == code
    said_lines = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert len(said_lines) == 1 and "Traceback" not in done.stderr
    assert code == 1 or done.stderr.count("\n") == 1
    assert said in said_lines[0]
    assert not out.exists()
