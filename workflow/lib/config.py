"""The effective configuration of a run: config/config.yaml, then config/presets/RUN.yaml, checked before anything runs.

What is measured is here; how it is run (cores, paths of environments) is in `profiles/`. A wrong setting is refused
with its key and what is allowed. Imports no torch, since Snakemake reads this while it builds the graph, unless a
checkpoint has a `model_type` that workflow/lib/models.py does not know.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pynvml

from djinn_core.errors import WeightsError
from djinn_core.models.folder import find_folder, is_hub_id, weights_file
from workflow.lib import models
from workflow.lib.results import schema
from workflow.lib.systems import SYSTEMS
from workflow.lib.yamlfile import SettingsError, parse, read_yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config"
GRID = CONFIG / "deepspeed_grid.yaml"
EXPERIMENTS = ("certify", "streaming", "resume", "pressure")
# from the largest to the smallest: `auto` takes the first that fits the machine; other presets are taken by name
PRESETS = ("h200", "h100", "l4", "cpu")
CHECKPOINTS = "null, a folder with config.json and safetensors, or a hub id (owner/name) in the local cache"


def load_config(run: str, overrides: list[str] | None = None, *, folder: Path = CONFIG) -> dict[str, Any]:
    """The checked settings of `run` (a preset's name).

    Args:
        overrides: ``section.key=value`` each, the value in YAML, for development; they are recorded in every result
            under `overrides`.

    Raises:
        SettingsError: no such preset, or a setting that the schema or the model does not allow.
    """
    known = sorted(file.stem for file in (folder / "presets").glob("*.yaml"))
    if run not in known:  # a path is no name: results/RUN would lie somewhere else
        raise SettingsError(f"run: no preset {run!r}; allowed: {', '.join(known)}")
    path = folder / "presets" / f"{run}.yaml"
    preset = read_yaml(path)
    if "run" in preset:
        raise SettingsError(f"{path}: run: a preset's name is that of its file; remove the key")
    settings = merge(read_yaml(folder / "config.yaml"), preset)
    settings["run"] = run
    for override in overrides or []:
        apply_override(settings, override)
    check(settings, where=f"{path.parent.name}/{path.name}")
    if "streaming" in settings:
        read_grid()
    settings["overrides"] = list(overrides or [])
    return settings


def check_command_line(given: dict[str, Any], *, folder: Path = CONFIG) -> None:
    """Refuse what `snakemake --config` or `--configfile` gave beyond `run`: nothing would read it.

    Raises:
        SettingsError: with the key, and where such a setting belongs.
    """
    committed = read_yaml(folder / "config.yaml")
    for key, value in given.items():
        if key != "run" and (key not in committed or committed[key] != value):
            raise SettingsError(f"--config {key}: allowed: run; settings belong into config/config.yaml or a preset")


def run_of(given: dict[str, Any], *, folder: Path = CONFIG) -> str:
    """The run that `--config run=` gave, else that of config.yaml; for `auto` the preset that fits this machine."""
    run = given["run"] if "run" in given else read_yaml(folder / "config.yaml").get("run")
    return auto_run(folder=folder) if run == "auto" else run


def auto_run(*, folder: Path = CONFIG) -> str:
    """The largest preset whose GPU memory and host memory this machine has; `cpu` without such a GPU.

    A GPU that no preset fits is named on stderr, so that a run on the emulated device is not taken for one on it.
    """
    gpu_bytes = first_gpu_bytes()
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for run in PRESETS[:-1]:
        path = folder / "presets" / f"{run}.yaml"
        try:
            needs = read_yaml(path)["machine"]["needs"]
            fits = gpu_bytes >= needs["device_bytes"] and host_bytes >= needs["host_bytes"]
        except (KeyError, TypeError) as error:
            raise SettingsError(f"{path}: machine.needs: wanted device_bytes and host_bytes, both numbers") from error
        if fits:
            return run
    if gpu_bytes:
        print(
            f"no GPU preset fits {gpu_bytes:,} bytes of GPU memory and {host_bytes:,} of host memory; taking "
            f"{PRESETS[-1]!r}, which does not use the GPU (a preset by name: --config run=l4)",
            file=sys.stderr,
        )
    return PRESETS[-1]


def first_gpu_bytes() -> int:
    """Memory of the first GPU; 0 without a driver."""
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return 0
    try:
        if pynvml.nvmlDeviceGetCount() == 0:
            return 0
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).total)
    finally:
        pynvml.nvmlShutdown()


def section(settings: dict[str, Any], experiment: str) -> dict[str, Any]:
    """The effective settings of one experiment: its own section with the machine's beside it.

    Raises:
        SettingsError: the preset does not measure this experiment.
    """
    if experiment not in settings:
        there = ", ".join(name for name in EXPERIMENTS if name in settings)
        raise SettingsError(f"{settings['run']}: this preset has no section {experiment!r}; it measures: {there}")
    own = deepcopy(settings[experiment])
    return own | {"machine": deepcopy(settings["machine"]), "overrides": list(settings.get("overrides", []))}


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` on top, mappings merged key by key."""
    merged = deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else deepcopy(value)
    return merged


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Set one ``section.key=value`` in place."""
    name, equals, text = override.partition("=")
    *parents, key = name.split(".")
    if not equals or not key:
        raise SettingsError(f"--set {override}: wanted section.key=value")
    if name == "run":
        raise SettingsError(f"--set {override}: the preset is named by --run")
    place = settings
    for parent in parents:
        place = place.get(parent) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise SettingsError(f"--set {override}: there is no section {parent!r}")
    place[key] = parse(text, f"--set {override}")


def _whole(_: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(_: Any, value: Any) -> bool:
    return _whole(_, value) or (isinstance(value, float) and math.isfinite(value))


# JSON Schema takes 3.0 for an integer, and YAML knows .nan and .inf: neither can be computed with
Strict = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine_many({"integer": _whole, "number": _finite}),
)


def check(settings: dict[str, Any], where: str) -> None:
    """Refuse settings that the schema or the model does not allow; an unknown key before one that is missing for it."""
    check_schema(settings, "config", where)
    for experiment in EXPERIMENTS:
        check_systems(experiment, settings.get(experiment, {}).get("expected_by_system", {}), where)
        if "model" in settings.get(experiment, {}):
            if settings[experiment]["model"]["path"] is not None:
                check_path(experiment, settings[experiment]["model"]["path"], where)
            check_against_model(experiment, settings[experiment], where)


def check_schema(document: dict[str, Any], name: str, where: str) -> None:
    """Refuse what the schema NAME does not allow."""
    error = min(
        Strict(schema(name)).iter_errors(document),
        key=lambda error: (error.validator != "additionalProperties", list(map(str, error.absolute_path))),
        default=None,
    )
    if error is not None:
        raise SettingsError(f"{where}: {explain(error)}")


def check_systems(experiment: str, named: dict[str, Any], where: str) -> None:
    """What is expected of a system that does not exist would be read by nobody."""
    allowed = SYSTEMS.get(experiment, ())
    for system in named:
        if system not in allowed:
            key = f"{experiment}.expected_by_system.{system}"
            raise SettingsError(
                f"{where}: {key}: no such system{hint(system, list(allowed))}; allowed: {', '.join(allowed)}"
            )


def read_grid(path: Path = GRID) -> list[dict[str, float]]:
    """The points of DeepSpeed's settings that are tried, checked.

    Raises:
        SettingsError: with the path, the key and what is allowed.
    """
    grid = read_yaml(path)
    check_schema(grid, "grid", str(path))
    return grid["points"]


def explain(error: jsonschema.ValidationError) -> str:
    """One line: the key, what is wrong, and what is allowed there."""
    place = ".".join(str(part) for part in error.absolute_path)
    if error.validator == "additionalProperties":
        allowed = sorted(error.schema.get("properties", {}))
        unknown = sorted(set(error.instance) - set(allowed))[0]
        key = f"{place}.{unknown}" if place else unknown
        return f"{key}: unknown key{hint(unknown, allowed)}; allowed: {', '.join(allowed)}"
    return f"{place or '(top)'}: {error.message}"


def hint(unknown: str, allowed: list[str]) -> str:
    """What was probably meant: the same name with its unit, or the nearest spelling."""
    with_unit = [name for name in allowed if name.startswith(f"{unknown}_")]
    if with_unit:
        return f", the unit belongs to the name: {' or '.join(with_unit)}"
    near = difflib.get_close_matches(unknown, allowed, n=1)
    return f", did you mean {near[0]}?" if near else ""


def check_path(experiment: str, path: str, where: str) -> None:
    """A checkpoint that `djinn.load` finds, with a config and weights; what is in them is checked when it loads."""
    try:
        folder = find_folder(path)
        if folder is None:
            said = "not in the local Hugging Face cache, download it first" if is_hub_id(path) else "no hub id either"
            raise FileNotFoundError(f"no such folder, and {said}")
        weights_file(folder)
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict) or "model_type" not in config:
            raise ValueError(f"{folder / 'config.json'} has no `model_type`")
        if not models.is_known(config["model_type"]):
            raise ValueError(
                f"{folder / 'config.json'}: `model_type` is {config['model_type']!r}, which transformers does not know"
            )
    except (WeightsError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~NAME of nobody
        raise SettingsError(f"{where}: {experiment}.model.path: {path!r}: {error}; allowed: {CHECKPOINTS}") from error


def check_against_model(experiment: str, settings: dict[str, Any], where: str) -> None:
    """Layers within the model's depth, chunks within a ring slot, prompts within its positions."""
    try:
        shape = models.shape_of(settings["model"], settings["dtype"])
    except ValueError as error:
        key = "path" if settings["model"]["path"] else "name"
        raise SettingsError(
            f"{where}: {experiment}.model.{key}: {settings['model'][key]!r}: config.json: {error}"
        ) from error
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in models.ARCHITECTURES.glob("*.json")))
        raise SettingsError(
            f"{where}: {experiment}.model.name: no architecture {settings['model']['name']!r}; allowed: {known}"
        ) from error
    if shape is None:
        return
    name = shape.name
    for key in ("layers", "layer"):
        value = settings.get(key, [])
        for layer in value if isinstance(value, list) else [value]:
            if not 1 <= layer <= shape.layers:
                allowed = f"{name} allows 1 to {shape.layers}"
                raise SettingsError(f"{where}: {experiment}.{key}: layer {layer} is out of range; {allowed}")
    for system, chunk_bytes in settings.get("chunk_bytes", {}).items():
        if chunk_bytes > shape.layer_bytes:
            raise SettingsError(
                f"{where}: {experiment}.chunk_bytes.{system}: a chunk of {chunk_bytes:,} bytes is larger than a ring "
                f"slot; a layer of {name} in {settings['dtype']} allows at most {shape.layer_bytes:,}"
            )
    tokens = settings.get("prompt_tokens", 0)
    if shape.max_positions is not None and tokens >= shape.max_positions:
        allowed = f"{name} allows up to {shape.max_positions - 1}"
        raise SettingsError(f"{where}: {experiment}.prompt_tokens: {tokens} leaves no room to generate; {allowed}")


def canonical(settings: dict[str, Any], experiment: str) -> str:
    """One line that changes when, and only when, the settings of `experiment` or its model do: a rule's parameter."""
    given = section(settings, experiment)
    if "model" in given:
        given = given | {"model_stamp": models.stamp_of(given["model"])}
    return json.dumps(given, sort_keys=True, separators=(",", ":"))
