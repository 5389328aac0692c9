"""Table 1: what each method costs. Markdown, LaTeX and CSV from the same rows.

    python -m workflow.plots.table1 --results results/cpu --out paper_figures/table1.md

Latency is the median at the deepest breakpoint, for the whole session, of the rows that figure 7 shows. Sessions at the
cap come from the pressure run, or read "not run". The lines of code are counted in the methods' own source, between
`# user-code begin` and `# user-code end`, over the methods that a class has or inherits: what a user would write, and
nothing else.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

import pandas as pd

from workflow.lib.results import ResultError, write_text
from workflow.lib.systems import PRESSURE_SYSTEMS, RESUME_METHODS
from workflow.plots.load import ResultFile, certificate_of, digest, in_words, read_comparable, read_folder, shown_from
from workflow.plots.style import label, machine_line, runs_line

METHODS_FOLDER = Path(__file__).resolve().parents[1] / "scripts/resume_methods"
BEGIN, END = "# user-code begin", "# user-code end"
NOT_RUN = "not run"
WHOLE = "S"
HEADS = {
    "method": "method",
    "ready_ms": "next layer (ms)",
    "next_logits_ms": "next logits (ms)",
    "sessions": "sessions at the cap",
    "edits": "state editing",
    "lines": "lines of user code",
}
# where a method's sessions under the cap were measured: the pressure run's file and the rows in it
PRESSURE_ROWS = {
    "eager": ("eager", "eager"),
    "manual_offload_pinned": ("manual_offload", "manual_offload_pinned"),
    "manual_offload_overlapped": ("manual_offload", "manual_offload_overlapped"),
    "djinn": ("djinn", "djinn"),
}


def deepest(file: ResultFile, metric: str, method: str) -> tuple[float, dict] | None:
    """The deepest layer with samples of the method's whole session, and their summary."""
    where = {"state": WHOLE} | ({} if file.system == method else {"method": method})
    rows = file.select(metric, where)
    layers = rows["layer"].dropna() if "layer" in rows.columns else rows["value"].iloc[0:0]
    if layers.empty:
        return None
    layer = float(layers.max())
    return layer, file.summary(metric, where | {"layer": layer})


def latency(file: ResultFile, metric: str, method: str) -> str:
    if not file.ok:
        return in_words(file.status)
    found = deepest(file, metric, method)
    if found is None:
        return "not measured"
    _, row = found
    median, low, high = (number(row[name]) for name in ("median", "ci95_low", "ci95_high"))
    return f"{median} [{low}, {high}]"


def number(value: float) -> str:
    """Three digits, and never an exponent."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def sessions(method: str, pressure: dict[str, ResultFile]) -> str:
    """How many sessions stood open under the cap, the fewest over the seeds, of how many were asked."""
    system, rows = PRESSURE_ROWS.get(method, (None, None))
    if system not in pressure:
        return NOT_RUN
    result = pressure[system]
    if result.gpu is None and not system.startswith("djinn"):
        return "no cap for it on an emulated device"
    values = result.values("sessions_at_cap", {"method": rows})
    if not len(values):
        return NOT_RUN if result.ok else in_words(result.status)
    asked = result.config.get("sessions")
    return f"{values.min():g}" + (f" of {asked}" if asked else "")


def edits(result: ResultFile) -> str:
    """Whether the method edits a stored state, as its own checks show: changed by an edit, unharmed without it."""
    names = ("steering_changes_logits", "unedited_checkpoint_unchanged")
    found = [result.checks[name]["passed"] for name in names if name in result.checks]
    if not found:
        return "by hand"
    return "declarative, checked" if all(passed is True for passed in found) else "checked, failed"


def classes_in(folder: Path) -> dict[str, tuple[ast.ClassDef, list[str]]]:
    """Every class of the methods' sources by its name, with the lines of its file."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = (node, text.splitlines())
    return found


def method_name(node: ast.ClassDef) -> str | None:
    """The value of the class's own `name = "..."`."""
    for item in node.body:
        targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
        named = any(isinstance(target, ast.Name) and target.id == "name" for target in targets)
        if named and isinstance(getattr(item, "value", None), ast.Constant):
            return item.value.value
    return None


def marked(function: ast.FunctionDef, lines: list[str]) -> int:
    """Lines of code between the marks in one function; blank lines and comments do not count.

    Raises:
        ResultError: a mark without its partner.
    """
    end = function.end_lineno
    while end < len(lines) and lines[end].lstrip().startswith("#") and lines[end].index("#") > function.col_offset:
        end += 1  # a comment after the last statement is no part of the function's tree
    count, inside = 0, False
    for line in (text.strip() for text in lines[function.lineno - 1 : end]):
        if line in (BEGIN, END):
            if inside == (line == BEGIN):
                raise ResultError(f"{function.name}: `{line}` without its partner")
            inside = line == BEGIN
        elif inside and line and not line.startswith("#"):
            count += 1
    if inside:
        raise ResultError(f"{function.name}: `{BEGIN}` without its partner")
    return count


def user_lines(folder: Path) -> dict[str, int]:
    """Lines that a user of each method writes, by the method's name, inherited functions included."""
    classes = classes_in(folder)

    def functions(name: str) -> dict[str, int]:
        if name not in classes:
            return {}
        node, lines = classes[name]
        found: dict[str, int] = {}
        for base in reversed(node.bases):
            if isinstance(base, ast.Name):
                found |= functions(base.id)
        return found | {item.name: marked(item, lines) for item in node.body if isinstance(item, ast.FunctionDef)}

    named = {name: method_name(node) for name, (node, _) in classes.items()}
    return {method: sum(functions(name).values()) for name, method in named.items() if method}


def table(resume: list[ResultFile], pressure: dict[str, ResultFile], folder: Path) -> pd.DataFrame:
    """One row per method."""
    lines = user_lines(folder)
    rows, files = [], shown_from(resume)
    for result in resume:
        row = {"method": label(result.system)}
        shown = files[result.system]
        row |= {metric: latency(shown, metric, result.system) for metric in ("ready_ms", "next_logits_ms")}
        row |= {"sessions": sessions(result.system, pressure), "edits": edits(result)}
        row["lines"] = str(lines[result.system]) if result.system in lines else "not marked"
        rows.append(row)
    return pd.DataFrame(rows, columns=list(HEADS))


def markdown(rows: pd.DataFrame, notes: list[str]) -> str:
    lines = ["| " + " | ".join(HEADS.values()) + " |", "| --- |" + " ---: |" * 3 + " --- | ---: |"]
    lines += ["| " + " | ".join(row) + " |" for row in rows.itertuples(index=False)]
    return "\n".join([*lines, "", *notes]) + "\n"


def latex(rows: pd.DataFrame, notes: list[str]) -> str:
    def escaped(text: str) -> str:
        return "".join("\\" + letter if letter in "&%$#_{}" else letter for letter in text).replace("·", "$\\cdot$")

    lines = [*(f"% {note}" for note in notes), r"\begin{tabular}{lrrrlr}", r"\toprule"]
    lines.append(" & ".join(escaped(head) for head in HEADS.values()) + r" \\")
    lines.append(r"\midrule")
    lines += [" & ".join(escaped(cell) for cell in row) + r" \\" for row in rows.itertuples(index=False)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def draw(results_dir: Path, out: Path, folder: Path = METHODS_FOLDER) -> None:
    """Write the table as `out` (Markdown), and beside it as .tex and .csv.

    Raises:
        ResultError: a file is missing, files may not be compared, or a mark in a source has no partner.
    """
    resume = read_folder(results_dir / "resume", RESUME_METHODS)
    paths = [results_dir / "pressure" / f"{system}.json" for system in PRESSURE_SYSTEMS]
    pressure = {result.system: result for result in read_comparable(path for path in paths if path.exists())}
    djinn = next(result for result in resume if result.system == "djinn")
    found = deepest(djinn, "next_logits_ms", "djinn") if djinn.ok else None
    shown = [*resume, *pressure.values()]
    notes = [f"{machine_line(resume)} · input {digest(result.path for result in shown)}"]
    if pressure and machine_line([*pressure.values()]) != machine_line(resume):
        notes.append(f"Sessions at the cap: {machine_line([*pressure.values()])}")
    certificates = {name: certificate_of(results_dir, name) for name in ("resume", "pressure")}
    covered = all(certificates[result.data["experiment"]].covers(result) for result in shown)
    marks = [] if covered else ["uncertified machine"]
    marks += ["emulated device"] if any(result.gpu is None for result in shown) else []
    notes += [", ".join(marks)] if marks else []
    depth = f"after layer {found[0]:g}, the deepest" if found else "at the deepest breakpoint"
    notes.append(f"Latency {depth}, of the whole session: median with its 95 % interval.")
    notes.append(f"The methods' rows: {runs_line(shown_from(resume))}.")
    rows = table(resume, pressure, folder)
    write_text(out, markdown(rows, notes))
    write_text(out.with_suffix(".tex"), latex(rows, notes))
    write_text(out.with_suffix(".csv"), rows.to_csv(index=False, lineterminator="\n"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="a run's folder, such as results/cpu")
    parser.add_argument("--out", type=Path, required=True, help="the .md file, or the folder to put table1.md in")
    args = parser.parse_args()
    try:
        draw(args.results, args.out if args.out.suffix else args.out / "table1.md")
    except ResultError as error:
        print(f"table1: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
