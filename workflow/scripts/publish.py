"""Publish experiments: copy their results to results/published/MACHINE, draw the figures and judge the claims there.

    python -m workflow.scripts.publish --results results/h200 --machine h200
    python -m workflow.scripts.publish --results a/results/h200 --results b/results/h200 --machine h200

No rule calls this: what is published was measured once and is not made again by a pipeline. A set holds experiments of
one kind of machine, each measured on one card, with that card's certificate beside its results. Those given replace
their own earlier results (with `--replace`) and join the others that are there. Results of code with uncommitted
changes and of a machine whose certificate does not cover them are refused. Everything is prepared beside the target
and moved into place at the end, so that a refusal changes nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from workflow.lib.results import ResultError, assert_comparable, write_json, write_text, writing
from workflow.plots import fig5, fig6, fig7, table1
from workflow.plots.load import CERTIFICATE, NOT_RUN, ResultFile, certificate_of, not_run_reasons, read
from workflow.scripts import claims, memory_breakdown, report

PUBLISHED = Path("results/published")
EXPERIMENTS = ("streaming", "resume", "pressure")
# what was measured; reports, figures and verdicts are made from the copies
COPIED = ("*.json", "dmon_*.csv", "*.log")
FIGURES = {"streaming": (fig5,), "pressure": (fig6,), "resume": (fig7,)}
# what makes two machines one kind; memory in whole GiB, since what the kernel keeps for itself differs
KIND = (
    *("gpu", "gpu_memory_bytes", "driver", "pcie_generation", "pcie_width"),
    *("cpu", "cores", "memory_gib", "numa_nodes"),
)


def result_files(folder: Path, experiment: str) -> list[ResultFile]:
    """Every result of one experiment in a run or a published set."""
    paths = sorted((folder / experiment).glob("*.json"))
    return [read(path) for path in paths if path.name != CERTIFICATE]


def experiments_in(folder: Path) -> list[str]:
    """The experiments that a run or a published set holds results of."""
    return [name for name in EXPERIMENTS if any(p.name != CERTIFICATE for p in (folder / name).glob("*.json"))]


def given_sources(folders: Sequence[Path], only: Iterable[str] = ()) -> dict[str, Path]:
    """Which folder each experiment is taken from.

    Args:
        only: leave the other experiments of these folders out; all are taken when it is empty.

    Raises:
        ResultError: a folder holds none of them, one of `only` is in no folder, or two folders hold the same one.
    """
    wanted, sources = set(only) or set(EXPERIMENTS), {}
    for folder in folders:
        names = [name for name in experiments_in(folder) if name in wanted]
        if not names:
            raise ResultError(f"{folder} holds no result of {', '.join(sorted(wanted))}: run them first")
        for name in names:
            if name in sources:
                raise ResultError(f"{name} is in {sources[name]} and in {folder}: give it once, or choose with --only")
            sources[name] = folder
    absent = set(only) - set(sources)
    if absent:
        raise ResultError(f"{', '.join(sorted(absent))}: no result in {', '.join(map(str, folders))}")
    return sources


def machine_kind(result: ResultFile) -> dict[str, Any]:
    """What the machines of one published set must share."""
    facts = dict(result.machine_kind)
    facts["memory_gib"] = round(facts["memory_bytes"] / 2**30)
    return {name: facts.get(name) for name in KIND}


def refuse_unfit(sources: Mapping[str, Path]) -> None:
    """Check that the experiments may stand beside each other, for good.

    Raises:
        ResultError: machine kinds differ, one experiment's results are of two machines or two codes, code was changed
            and not committed, or a machine is not certified.
    """
    first: ResultFile | None = None
    for experiment, folder in sources.items():
        certificate = certificate_of(folder, experiment)
        results = result_files(folder, experiment)
        assert_comparable(result.data for result in results)
        for result in results:
            first = first or result
            refuse_other_kind(first, result)
            if result.data["source"]["dirty"] is not False or not result.data["source"]["commit"]:
                raise ResultError(f"{result.path} was measured with uncommitted code: commit, then measure it again")
            if not certificate.covers(result):
                told = f"{certificate.path} ({certificate.verdict}, machine {certificate.machine_id})"
                raise ResultError(f"{told} does not certify the machine of {result.path}: run certify there")


def refuse_other_kind(first: ResultFile, result: ResultFile) -> None:
    """Raises ResultError when the two were measured on different kinds of machine."""
    for (name, value), here in zip(machine_kind(first).items(), machine_kind(result).values(), strict=True):
        if here != value:
            raise ResultError(
                f"{first.path} and {result.path} differ in machine.kind.{name} ({value} and {here}): measure them on"
                " one kind of machine, or publish them under another name"
            )


def absent_systems(sources: Mapping[str, Path], given: Iterable[str], without: Mapping[str, str]) -> dict[str, str]:
    """Why the set lacks which systems: of the experiments given as `without` says, of the others as it was said.

    Raises:
        ResultError: `without` names an experiment that is not given, a system whose result is there, or no reason.
    """
    for name, reason in without.items():
        experiment, _, system = name.partition("/")
        if experiment not in given or not system or not reason:
            raise ResultError(f"--without {name}={reason}: wanted SYSTEM of {', '.join(given)} and a reason")
        if (sources[experiment] / f"{name}.json").exists():
            raise ResultError(f"--without {name}: {sources[experiment]}/{name}.json is there and is published as it is")
    told = {}
    for experiment, folder in sources.items():
        said = not_run_reasons(folder) | (without if experiment in given else {})
        told |= {name: reason for name, reason in said.items() if name.startswith(f"{experiment}/")}
    return told


def copy_results(sources: Mapping[str, Path], target: Path) -> None:
    """Each experiment's files with its certificate, without logs of rules, tensors or caches."""
    for experiment, folder in sources.items():
        (target / experiment).mkdir(parents=True)
        shutil.copy2(certificate_of(folder, experiment).path, target / experiment / CERTIFICATE)
        for path in sorted(path for pattern in COPIED for path in (folder / experiment).glob(pattern)):
            shutil.copy2(path, target / experiment / path.name)


def draw_figures(folder: Path) -> list[str]:
    """Each experiment's figures into `{folder}/figures`, from the copies; returns what was drawn."""
    drawn = []
    for name, modules in FIGURES.items():
        if not (folder / name).is_dir():
            continue
        for module in modules:
            out = folder / "figures" / f"{module.__name__.rpartition('.')[2]}.pdf"
            module.draw(folder, out, out.with_suffix(".csv"))
            drawn.append(out.name)
    if (folder / "resume").is_dir():
        table1.draw(folder, folder / "figures/table1.md")
        drawn.append("table1.md")
    return drawn


def write_reports(folder: Path, claims_path: Path) -> None:
    """The tables that lie beside results, from the copies; no breakdown where Djinn left no ledger samples."""
    if (folder / "streaming").is_dir():
        report.write(folder, claims_path, folder / "streaming/report.md")
    djinn = folder / "pressure/djinn.json"
    if djinn.exists() and len(read(djinn).select(memory_breakdown.METRIC)):
        memory_breakdown.write(djinn, folder / "pressure/memory_breakdown.md")


def publish(
    folders: Sequence[Path],
    target: Path,
    *,
    only: Iterable[str] = (),
    replace: bool = False,
    without: Mapping[str, str] | None = None,
    claims_path: Path = claims.CLAIMS,
) -> list[str]:
    """Publish the experiments in `folders` as `target`, beside those that are there; returns the figures drawn.

    Args:
        only: these experiments of the folders; all of them when it is empty.
        replace: experiments that are in the set already give way to the ones given.
        without: why a system was not run, by `experiment/system`; figures and claims show it as not run.

    Raises:
        ResultError: an experiment is published already and `replace` is not given, or the results are unfit to stand
            beside each other; nothing is changed.
    """
    given = given_sources(folders, only)
    published = experiments_in(target)
    again = [name for name in published if name in given]
    if again and not replace:
        raise ResultError(f"{target} has {', '.join(again)} already: pass --replace to publish over it")
    sources = {name: given.get(name, target) for name in EXPERIMENTS if name in given or name in published}
    refuse_unfit(sources)
    absent = absent_systems(sources, list(given), without or {})
    aside = target.with_name(f".{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with writing(target):
            copy_results(sources, aside)
        if absent:
            write_json(aside / NOT_RUN, absent)
        drawn = draw_figures(aside)
        write_reports(aside, claims_path)
        judged = claims.judge_all(claims.load_claims(claims_path), aside)
        write_json(aside / "claims.json", claims.document(judged, aside))
        write_text(aside / "claims.md", claims.table(judged, aside, target))
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return drawn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results", type=Path, action="append", required=True, help="a run's folder, such as results/h200; repeatable"
    )
    parser.add_argument("--machine", required=True, help="the name to publish under, such as h200")
    parser.add_argument("--published", type=Path, default=PUBLISHED, help="the folder of published sets")
    parser.add_argument(
        "--only", action="append", default=[], choices=EXPERIMENTS, help="this experiment of the folders; repeatable"
    )
    parser.add_argument("--replace", action="store_true", help="publish over experiments that the set has already")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="EXPERIMENT/SYSTEM=WHY",
        help="a system that was not run; without this, a missing file is refused",
    )
    args = parser.parse_args()
    without = dict(entry.partition("=")[::2] for entry in args.without)
    target = args.published / args.machine
    try:
        drawn = publish(args.results, target, only=args.only, replace=args.replace, without=without)
    except ResultError as error:
        print(f"publish: {error}", file=sys.stderr)
        return 1
    print(f"{target}: {', '.join(drawn) or 'no figure'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
