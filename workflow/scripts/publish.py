"""Publish a run: copy its results to results/published/MACHINE, draw its figures there, judge its claims there.

    python -m workflow.scripts.publish --results results/h200 --machine h200

No rule calls this: what is published was measured once and is not made again by a pipeline. It refuses results of
different machine kinds, of code with uncommitted changes, and of a machine whose certificate does not cover them.
Everything is prepared beside the target and moved into place at the end, so that a refusal changes nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from workflow.lib.results import ResultError, write_json, write_text
from workflow.plots import fig5, fig6, fig7, table1
from workflow.plots.load import NOT_RUN, ResultFile, read, read_certificate
from workflow.scripts import claims

PUBLISHED = Path("results/published")
EXPERIMENTS = ("streaming", "resume", "pressure", "rpc")
COPIED = ("*.json", "*.csv", "*.md", "*.log")
FIGURES = {"streaming": (fig5,), "pressure": (fig6,), "resume": (fig7,)}


def result_files(folder: Path) -> list[ResultFile]:
    """Every result of the run.

    Raises:
        ResultError: there is none.
    """
    found = [read(path) for name in EXPERIMENTS for path in sorted((folder / name).glob("*.json"))]
    if not found:
        raise ResultError(f"{folder} holds no result: run `snakemake --config run={folder.name}` first")
    return found


def refuse_unfit(folder: Path, results: list[ResultFile]) -> None:
    """Check that the results may stand beside each other, for good.

    Raises:
        ResultError: machine kinds differ, code was changed and not committed, or the machine is not certified.
    """
    certificate = read_certificate(folder / "certificate.json")
    first = results[0]
    for result in results:
        for name, value in first.machine_kind.items():
            if result.machine_kind.get(name) != value:
                here = result.machine_kind.get(name)
                raise ResultError(
                    f"{first.path} and {result.path} differ in machine.kind.{name} ({value} and {here}):"
                    " measure them on one kind of machine"
                )
        if result.data["source"]["dirty"] is not False or not result.data["source"]["commit"]:
            raise ResultError(f"{result.path} was measured with uncommitted code: commit, then measure it again")
        if not certificate.covers(result):
            told = f"{certificate.path} ({certificate.verdict}, machine {certificate.machine_id})"
            raise ResultError(f"{told} does not certify the machine of {result.path}: run certify there")


def copy_results(folder: Path, target: Path) -> None:
    """The certificate and each experiment's files, without logs of rules, tensors or caches."""
    target.mkdir(parents=True)
    shutil.copy2(folder / "certificate.json", target / "certificate.json")
    for name in EXPERIMENTS:
        for path in sorted(path for pattern in COPIED for path in (folder / name).glob(pattern)):
            (target / name).mkdir(exist_ok=True)
            shutil.copy2(path, target / name / path.name)


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


def publish(
    folder: Path,
    target: Path,
    *,
    replace: bool,
    without: dict[str, str] | None = None,
    claims_path: Path = claims.CLAIMS,
) -> list[str]:
    """Publish the run in `folder` as `target`; returns the figures drawn.

    Args:
        without: why a system was not run, by `experiment/system`; figures and claims show it as not run.

    Raises:
        ResultError: the target is there and `replace` is not given, or the results are unfit; nothing is changed.
    """
    if target.exists() and not replace:
        raise ResultError(f"{target} is there already: pass --replace to publish over it")
    refuse_unfit(folder, result_files(folder))
    aside = target.with_name(f".{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        copy_results(folder, aside)
        if without:
            write_json(aside / NOT_RUN, without)
        drawn = draw_figures(aside)
        judged = claims.judge_all(claims.load_claims(claims_path), aside)
        write_json(aside / "claims.json", claims.document(judged, aside))
        write_text(aside / "claims.md", claims.table(judged, target))
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return drawn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="the run's folder, such as results/h200")
    parser.add_argument("--machine", required=True, help="the name to publish under, such as h200")
    parser.add_argument("--published", type=Path, default=PUBLISHED, help="the folder of published sets")
    parser.add_argument("--replace", action="store_true", help="publish over a set of that name")
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
        drawn = publish(args.results, target, replace=args.replace, without=without)
    except ResultError as error:
        print(f"publish: {error}", file=sys.stderr)
        return 1
    print(f"{target}: {', '.join(drawn) or 'no figure'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
