"""Which result files a claim reads. Apart from the judging, so that the rules can ask without loading what judges."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any


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


def files_of(claim: Mapping[str, Any]) -> list[str]:
    """The result files that a claim reads, relative to the run's folder."""
    systems = itertools.chain.from_iterable(systems_of(filled(claim["value"], case)) for case in cases_of(claim))
    return [f"{claim['experiment']}/{system}.json" for system in dict.fromkeys(systems)]


def input_files(claims: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every result file that the claims read, relative to the run's folder."""
    return list(dict.fromkeys(name for claim in claims for name in files_of(claim)))
