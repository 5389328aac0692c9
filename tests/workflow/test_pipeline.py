"""The pipeline killed in the middle: nothing left behind, and the next run goes on. What it prints."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from workflow.lib.children import child
from workflow.lib.identity import code_of
from workflow.lib.stalelock import remove_stale_locks

ROOT = Path(__file__).resolve().parents[2]
SNAKEFILE = f"""
import sys
from pathlib import Path

sys.path.insert(0, "{ROOT}")
from workflow.lib.stalelock import remove_stale_locks

remove_stale_locks(Path.cwd())

rule slow:
    output: "done"
    shell: "test -e second || {{{{ echo running; touch second; sleep 100; }}}}; touch {{output}}"
"""


def snakemake(folder: Path) -> list[str]:
    return [sys.executable, "-m", "snakemake", "--cores", "1", "--rerun-incomplete", "--directory", str(folder)]


def test_a_killed_pipeline_is_taken_up_again(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    command = snakemake(tmp_path)
    with child(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as first:
        assert first.stdout.readline() == "running\n"
        assert list((tmp_path / ".snakemake" / "locks").iterdir())
        refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert "cannot be locked" in refused.stderr  # its owner lives: the lock holds
        os.kill(first.pid, signal.SIGKILL)
    assert list((tmp_path / ".snakemake" / "locks").iterdir())
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "done").exists()


def at_work(folder: Path, words: str = "") -> list[int]:
    """Processes that live in `folder`, with `words` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if entry.name.isdigit() and words in line and (entry / "cwd").resolve() == folder.resolve():
                found.append(int(entry.name))
        except OSError:  # it has ended
            continue
    return found


def wait_for(reached: Callable[[], object], timeout_s: float = 60) -> None:
    end_s = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def test_the_real_pipeline_is_taken_up_again(tmp_path: Path) -> None:
    """The certificate's rule, killed three times: with all of Snakemake, at once and at work, and alone.

    Then it runs to its end.
    """
    for name in ("workflow", "config", "profiles", "envs", "djinn_core"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", tmp_path)
    certificate = tmp_path / "results" / "cpu" / "certificate.json"
    command = [sys.executable, "-m", "snakemake", "--config", "run=cpu", "--", "results/cpu/certificate.json"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(tmp_path), "PATH": path}, "text": True}
    options |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    certify, log = "-m workflow.scripts.certify", certificate.parent / "logs" / "certify.log"

    for reached in (lambda: at_work(tmp_path, certify), log.exists):
        with child(command, **options) as whole:
            wait_for(reached)
            time.sleep(0.2)
            os.kill(whole.pid, signal.SIGKILL)
            whole.wait()
            wait_for(lambda: not at_work(tmp_path), 3)
        assert list((tmp_path / ".snakemake" / "locks").iterdir())
        assert results_in(tmp_path) == []
        log.unlink(missing_ok=True)

    with child(command, **options) as second:  # the lock of the dead one does not stop it
        wait_for(log.exists)
        for pid in at_work(tmp_path, certify):
            os.kill(pid, signal.SIGKILL)
        assert second.wait(30) != 0
    assert results_in(tmp_path) == [] and at_work(tmp_path) == []

    assert subprocess.run(command, timeout=60, check=False, **options).returncode == 0
    assert json.loads(certificate.read_text())
    assert results_in(tmp_path) == [certificate]


def results_in(folder: Path) -> list[Path]:
    """What lies among the results, logs left out."""
    return [path for path in (folder / "results").rglob("*") if path.is_file() and path.parent.name != "logs"]


def test_without_a_lock_nothing_is_removed(tmp_path: Path) -> None:
    assert remove_stale_locks(tmp_path) == []


TALKING = """
rule all:
    input: "good", "bad"

rule good:
    input: "long-list-of-code.py"
    output: "good"
    log: "good.log"
    shell: "touch {output}; echo all is well" + LOGGED

rule bad:
    input: "long-list-of-code.py"
    output: "bad"
    log: "bad.log"
    shell: "python -c 'raise SystemExit(chr(115) + chr(97) + chr(100))'" + LOGGED
"""


def test_elsewhere_the_pipeline_names_the_repositorys_root(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "-n", "all"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert refused.returncode != 0
    assert f"run from its root, {ROOT}" in refused.stdout + refused.stderr


def test_verdicts_and_report_are_made_again_when_code_that_they_import_changes() -> None:
    command = [sys.executable, "-m", "snakemake", "-n", "--quiet", "host", "--config", "run=cpu", "--forceall", "--"]
    done = subprocess.run([*command, "claims", "report"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    for rule in ("claims", "report"):
        inputs = re.search(rf"rule {rule}:\n +input: (.*)", done.stdout + done.stderr)[1].split(", ")
        assert {*code_of(rule), "workflow/schemas/claims.schema.json"} <= set(inputs)


def test_make_reproduce_takes_a_preset_by_name() -> None:
    for run, said in (("cpu", "all --config run=cpu\n"), ("", "all \n")):
        planned = subprocess.run(
            ["make", "-n", "reproduce", f"RUN={run}"], cwd=ROOT, capture_output=True, text=True, timeout=100
        )
        assert said in planned.stdout, planned.stderr


def test_the_profile_prints_progress_and_errors_and_no_lists(tmp_path: Path) -> None:
    common = (ROOT / "workflow" / "rules" / "common.smk").read_text()
    logged = next(line for line in common.splitlines() if line.startswith("LOGGED = "))
    (tmp_path / "Snakefile").write_text(logged + TALKING)
    (tmp_path / "long-list-of-code.py").touch()
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", str(ROOT / "profiles" / "default")]
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    said = failed.stdout + failed.stderr
    assert failed.returncode == 1 and (tmp_path / "good").exists()
    assert "1 of 3 steps" in said and "> bad.log" in said
    assert "sad" in said.splitlines()  # what the command printed, out of its log
    assert re.fullmatch(r"wrote good in \d+ s\n", (tmp_path / "good.log").read_text().partition("well\n")[2])
    assert "long-list" not in said
    done = subprocess.run([*command, "-n", "good"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "nothing to be done" in (done.stdout + done.stderr).lower()  # .ci/run looks for these words
