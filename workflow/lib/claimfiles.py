"""The claims, and which result files each reads. Apart from the judging, which the rules need not load to ask this."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from workflow.lib.results import ResultError, validate
from workflow.lib.systems import SYSTEMS
from workflow.lib.yamlfile import SettingsError, read_yaml

CLAIMS = Path("config/claims.yaml")


def load_claims(path: str | Path = CLAIMS) -> list[dict[str, Any]]:
    """The claims, checked by their schema.

    Raises:
        ResultError: the file cannot be read, names a key, a value, a $name or a system that is not allowed, or an id
            twice.
    """
    try:
        document = read_yaml(path)
    except SettingsError as error:
        raise ResultError(str(error)) from error
    validate(document, "claims", str(path))
    claims = document["claims"]
    twice = [name for name, count in Counter(claim["id"] for claim in claims).items() if count > 1]
    if twice:
        raise ResultError(f"{path}: the id {twice[0]} is used twice")
    for claim in claims:
        try:
            read = systems_read(claim)
        except KeyError as error:
            allowed = ", ".join(claim.get("each", {})) or "none, as there is no `each`"
            raise ResultError(
                f"{path}: {claim['id']}: ${error.args[0]} is not of `each`; allowed: {allowed}"
            ) from error
        experiment, known = claim["experiment"], SYSTEMS[claim["experiment"]]
        wrong = [system for system in read if system not in known]
        if wrong:
            raise ResultError(
                f"{path}: {claim['id']}: {experiment} has no system {wrong[0]!r}; allowed: {', '.join(known)}"
            )
    return claims


def filled(node: Any, variables: Mapping[str, Any]) -> Any:
    """The expression with `$name` replaced by the case's value of that name."""
    if isinstance(node, str) and node.startswith("$"):
        return variables[node[1:]]
    if isinstance(node, Mapping):
        return {name: filled(value, variables) for name, value in node.items()}
    if isinstance(node, list):
        return [filled(item, variables) for item in node]
    return node


def systems_of(node: Any) -> list[str]:
    """The systems that an expression reads, in order of appearance."""
    if isinstance(node, Mapping):
        found = [node["system"]] if "system" in node else []
        return list(dict.fromkeys(itertools.chain(found, *(systems_of(value) for value in node.values()))))
    if isinstance(node, list):
        return list(dict.fromkeys(itertools.chain.from_iterable(systems_of(item) for item in node)))
    return []


def cases_of(claim: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the claim's `each`; a claim without one has one case."""
    each = claim.get("each") or {}
    return [dict(zip(each, values, strict=True)) for values in itertools.product(*each.values())]


def systems_read(claim: Mapping[str, Any]) -> list[str]:
    """The systems that any case of a claim reads, in order of appearance."""
    return systems_of([filled(claim["value"], case) for case in cases_of(claim)])


def files_of(claim: Mapping[str, Any]) -> list[str]:
    """The result files that a claim reads, relative to the run's folder."""
    return [f"{claim['experiment']}/{system}.json" for system in systems_read(claim)]


def input_files(claims: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every result file that the claims read, relative to the run's folder."""
    return list(dict.fromkeys(name for claim in claims for name in files_of(claim)))
