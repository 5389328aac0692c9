"""What is done around every experiment: outcomes, limits, foreign processes, locks, children, memory, digests."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from djinn_core import machine
from djinn_core.errors import OutOfDeviceMemory, UnsupportedModel, WeightsError
from workflow.lib import cgroup, children, harness, identity, limits
from workflow.lib.memory import MemorySampler
from workflow.lib.results import DRIFTED, read_result, write_json
from workflow.lib.systems import STREAMING_SYSTEMS
from workflow.lib.trace import nothing_traced
from workflow.plots import fig5
from workflow.scripts import pressure, report, streaming

ROOT = Path(__file__).resolve().parents[2]
STEADY = {"h2d_gbps": 50.0, "d2h_gbps": 50.0, "bidirectional_gbps": 80.0, "peer_gbps": None}
DRIFT = {"drift_allowed": 0.02, "drift_decides": True}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """The harness changes this process; tests that follow get theirs back."""
    threads, handler, level = torch.get_num_threads(), signal.getsignal(signal.SIGTERM), logging.root.level
    handlers, omp, cudnn = (
        logging.root.handlers[:],
        os.environ.get("OMP_NUM_THREADS"),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    signal.signal(signal.SIGTERM, handler)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    if omp is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    else:
        os.environ["OMP_NUM_THREADS"] = omp


def run(
    tmp_path: Path,
    body: Any,
    *,
    rates: list[dict[str, Any]] | None = None,
    overrides: Any = (),
    experiment: str = "streaming",
) -> dict[str, Any]:
    out = tmp_path / experiment / "djinn.json"
    args = Namespace(run="cpu", out=out, overrides=list(overrides), log=tmp_path / "log")
    measured = iter(rates or [STEADY, STEADY])
    with harness.experiment(args, experiment=experiment, system="djinn", measure=lambda *_: next(measured)) as exp:
        body(exp)
    return read_result(out)


def measured(exp: harness.Experiment) -> None:
    exp.result.sample("pass_s", 1.0, "s")


def test_a_result_says_where_and_how_it_was_measured(tmp_path: Path) -> None:
    document = run(tmp_path, measured, overrides=["machine.threads=1"])
    assert document["status"] == "ok"
    assert document["config"]["threads"] == 1 == torch.get_num_threads()
    assert document["config"]["attention"]["cudnn"] is False
    assert document["config"]["cap_bytes"] == 40_000_000
    assert document["config"]["overrides"] == ["machine.threads=1"]
    assert document["source"]["digest"] == identity.code_digest("streaming")
    assert document["libraries"]["torch"] == torch.__version__
    assert document["limits"]["h2d_gbps"] == 50.0
    assert document["machine"]["kind"]["gpu"] is None
    assert document["machine"]["id"].startswith("cpu/")
    assert "ok in" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (OutOfDeviceMemory("no room", needed_bytes=2, free_bytes=1), "out_of_memory"),
        (UnsupportedModel("a recurrent state"), "unsupported"),
        (WeightsError("a tensor is missing"), "failed"),
        (harness.Outcome("unsupported", "needs 138 GB of host memory"), "unsupported"),
    ],
)
def test_what_happened_is_recorded(error: Exception, status: str, tmp_path: Path) -> None:
    def body(exp: harness.Experiment) -> None:
        raise error

    document = run(tmp_path, body)
    assert document["status"] == status
    assert str(error) in document["reason"]


def test_a_bug_writes_nothing(tmp_path: Path) -> None:
    def body(exp: harness.Experiment) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run(tmp_path, body)
    assert not list(tmp_path.glob("streaming/*"))
    assert "a bug" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("first", [SystemExit(143), KeyboardInterrupt(), KeyError("a bug")])
def test_an_error_of_the_cleanup_hides_nothing(first: BaseException, tmp_path: Path) -> None:
    def body(exp: harness.Experiment) -> None:
        try:
            raise first
        finally:
            raise WeightsError("what the cleanup said")

    with pytest.raises(WeightsError):
        run(tmp_path, body)
    assert not list(tmp_path.glob("streaming/*"))


@pytest.mark.parametrize(("after", "status"), [(49.1, "ok"), (48.9, "inconclusive"), (51.1, "inconclusive")])
def test_a_link_that_drifts_makes_it_inconclusive(after: float, status: str, tmp_path: Path) -> None:
    rates = [STEADY, STEADY | {"h2d_gbps": after}]
    document = run(tmp_path, measured, rates=rates, overrides=["machine.limits.drift_decides=true"])
    assert document["status"] == status
    assert document["limits"]["drift"] == pytest.approx(abs(after - 50) / 50)
    assert status == "ok" or document["reason"].startswith(f"{DRIFTED}: h2d_gbps by 2.20%")


@pytest.mark.parametrize("rate", ["h2d_gbps", "d2h_gbps", "bidirectional_gbps"])
@pytest.mark.parametrize(
    ("experiment", "decides"),
    [
        ("streaming", {"h2d_gbps"}),
        ("resume", {"h2d_gbps", "d2h_gbps"}),
        ("pressure", {"h2d_gbps", "d2h_gbps", "bidirectional_gbps"}),
    ],
)
def test_the_rates_that_an_experiment_uses_decide(experiment: str, decides: set, rate: str, tmp_path: Path) -> None:
    rates = [STEADY, STEADY | {rate: 0.9 * STEADY[rate]}]
    on = ["machine.limits.drift_decides=true"]
    document = run(tmp_path, measured, rates=rates, overrides=on, experiment=experiment)
    link = document["limits"]
    assert set(link["drift_of"]) == decides
    assert link["drift_by_rate"][rate] == pytest.approx(0.1) and link["drift_by_rate"]["peer_gbps"] is None
    assert link["drift"] == pytest.approx(0.1 if rate in decides else 0.0)
    assert document["status"] == ("inconclusive" if rate in decides else "ok")
    assert (rate in document["reason"]) == (rate in decides)


def test_an_experiment_without_an_entry_uses_every_rate() -> None:
    section = limits.bracket("new", "a", STEADY, STEADY | {"d2h_gbps": 51.5}, {"limits": DRIFT})
    assert section["drift_of"] == list(limits.RATES)
    assert limits.moved(section) == {"d2h_gbps": pytest.approx(0.03)}


def test_what_needs_the_link_around_the_whole_result_comes_at_the_end(tmp_path: Path) -> None:
    def body(exp: harness.Experiment) -> None:
        exp.at_end.append(lambda: exp.result.sample("late", exp.result.limits["h2d_gbps"], "GB/s"))

    document = run(tmp_path, body, rates=[STEADY | {"h2d_gbps": 50.0}, STEADY | {"h2d_gbps": 50.5}])
    assert [row["median"] for row in document["summary"] if row["metric"] == "late"] == [pytest.approx(50.25)]


@pytest.mark.parametrize(
    ("system", "moved"), [("djinn", True), ("manual_offload", True), ("djinn_uncapped", False), ("eager", False)]
)
def test_the_rate_both_ways_decides_where_something_is_swapped(system: str, moved: bool) -> None:
    section = limits.bracket("pressure", system, STEADY, STEADY | {"bidirectional_gbps": 40.0}, {"limits": DRIFT})
    assert bool(limits.moved(section)) == moved
    section = limits.bracket("pressure", system, STEADY, STEADY | {"d2h_gbps": 40.0}, {"limits": DRIFT})
    assert set(limits.moved(section)) == {"d2h_gbps"}


def test_drift_does_not_decide_about_a_reference() -> None:
    """It says which tokens are right, however fast the link is; all others would be without one."""
    section = limits.bracket("pressure", "reference", STEADY, STEADY | {"d2h_gbps": 40.0}, {"limits": DRIFT})
    assert section["drift_of"] == [] and section["drift"] == 0.0 and not limits.moved(section)
    assert section["drift_by_rate"]["d2h_gbps"] == pytest.approx(0.2)


def test_without_a_gpu_drift_decides_nothing_and_says_so(tmp_path: Path) -> None:
    document = run(tmp_path, measured, rates=[STEADY, STEADY | {"h2d_gbps": 25.0}])
    assert document["status"] == "ok"
    assert document["limits"]["drift"] == pytest.approx(0.5)
    assert "decides nothing" in document["limits"]["note"]


def with_foreign(monkeypatch: pytest.MonkeyPatch, calls: list[list[str]]) -> None:
    real = machine.state
    answers = iter(calls)
    monkeypatch.setattr(machine, "state", lambda uuid: real(None) | {"foreign_processes": next(answers)})


def test_a_foreign_process_before_ends_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_foreign(monkeypatch, [["process 7 (train)"]])
    with pytest.raises(SystemExit) as end:
        run(tmp_path, lambda exp: pytest.fail("the body must not run"))
    assert end.value.code == 0
    document = read_result(tmp_path / "streaming" / "djinn.json")
    assert document["status"] == "inconclusive"
    assert "process 7 (train)" in document["reason"]


def test_a_foreign_process_after_makes_it_inconclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_foreign(monkeypatch, [[], ["process 7 (train)"]])
    assert run(tmp_path, measured)["status"] == "inconclusive"


def test_memory_that_ran_out_beside_a_foreign_process_is_inconclusive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(exp: harness.Experiment) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with_foreign(monkeypatch, [[], ["process 7 (train)"]])
    assert run(tmp_path, body)["status"] == "inconclusive"


def test_what_the_machine_lacks_is_said_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        run(
            tmp_path,
            lambda exp: pytest.fail("the body must not run"),
            overrides=["streaming.expected.host_bytes=1000000000000000"],
        )
    assert end.value.code == 0
    document = read_result(tmp_path / "streaming" / "djinn.json")
    assert document["status"] == "unsupported"
    assert "needs 1,000,000,000,000,000 bytes of free host memory, have" in document["reason"]


def test_a_container_that_allows_less_than_the_host_has_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.cgroup, "free_bytes", lambda: 1_000_000)
    with pytest.raises(SystemExit):
        run(tmp_path, lambda exp: pytest.fail("the body must not run"))
    reason = read_result(tmp_path / "streaming" / "djinn.json")["reason"]
    assert reason == "needs 2,000,000,000 bytes of free host memory, have 1,000,000"


@pytest.mark.parametrize("version", ["v2", "v1"])
def test_what_a_control_group_has_left(version: str, tmp_path: Path) -> None:
    files, base = (cgroup.FILES_V2, tmp_path) if version == "v2" else (cgroup.FILES_V1, tmp_path / "memory")
    own = tmp_path / "cgroup"
    own.write_text("0::/pod/job\n" if version == "v2" else "3:cpuset:/\n4:memory:/pod/job\n")
    assert cgroup.free_bytes(tmp_path, own) is None

    def group(name: str, limit: str, used: int) -> None:
        folder = base / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, value in zip(files, (limit, str(used), f"cache 1\n{files[2]} 30"), strict=True):
            (folder / (file if "." in file else "memory.stat")).write_text(f"{value}\n")

    group("pod/job", "max" if version == "v2" else str(2**63 - 4096), 400)
    group("pod", "1000", 600)
    assert cgroup.free_bytes(tmp_path, own) == 1000 - 600 + 30  # the pod's limit holds for what is below it
    group("pod/job", "500", 400)
    assert cgroup.free_bytes(tmp_path, own) == 500 - 400 + 30


def test_a_model_that_the_host_cannot_hold_is_unsupported_for_every_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """70B on a card with room for its reference, and a host of 64 GB: nothing is loaded, nothing is killed."""
    kind = machine.kind(None) | {"gpu": "NVIDIA H200", "gpu_memory_bytes": 150_000_000_000}
    state = machine.state(None) | {"host_free_bytes": 64_000_000_000}
    monkeypatch.setattr(machine, "gpu_uuid", lambda: "GPU-1")
    monkeypatch.setattr(machine, "kind", lambda uuid: kind)
    monkeypatch.setattr(machine, "state", lambda uuid: state)
    monkeypatch.setattr(harness, "gpu_lock", lambda uuid: nullcontext(0.0))
    needed = {"deepspeed_cpu": 170, "deepspeed_cpu_tuned": 170}
    systems = [system for system in STREAMING_SYSTEMS if system != "deepspeed_nvme"]
    for system in systems:
        out = tmp_path / "streaming" / f"{system}.json"
        trace = out.with_name(f"dmon_{system}.csv")
        words = f"streaming --run h200_70b --system {system} --out {out} --trace {trace} --log {tmp_path}/log"
        monkeypatch.setattr(sys, "argv", words.split())
        with pytest.raises(SystemExit) as end:
            streaming.main()
        assert end.value.code == 0 and trace.exists()
        document = read_result(out)
        assert document["status"] == "unsupported"
        wanted = f"needs {needed.get(system, 150)},000,000,000 bytes of free host memory, have 64,000,000,000"
        assert document["reason"] == wanted
    write_json(tmp_path / "not_run.json", {"streaming/deepspeed_nvme": "it needs little host memory"})
    fig5.draw(tmp_path, tmp_path / "fig5.pdf", tmp_path / "fig5.csv")
    assert set(pd.read_csv(tmp_path / "fig5.csv")["status"]) == {"unsupported", "not_run"}
    text, _ = report.report(tmp_path, ROOT / "config/claims.yaml")
    assert text.count("needs 150,000,000,000 bytes") == len(systems) - len(needed)


def test_an_experiment_that_the_preset_does_not_measure_is_refused(tmp_path: Path, caplog) -> None:
    args = Namespace(run="h200_70b", out=tmp_path / "x.json", overrides=[], log=tmp_path / "log")
    with pytest.raises(SystemExit) as end, harness.experiment(args, experiment="resume", system="djinn"):
        pytest.fail("the body must not run")
    assert end.value.code == 2
    assert "no section 'resume'" in (tmp_path / "log").read_text()


def test_a_result_that_the_disk_does_not_take_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, measured)
    assert end.value.code == 1
    out = tmp_path / "streaming" / "djinn.json"
    for told in ((tmp_path / "log").read_text(), capsys.readouterr().err):
        assert f"ERROR djinn.experiment: {out} was not written: No space left on device; " in told
        assert "bytes were wanted; make room in " in told and "Traceback" not in told
    assert not list(out.parent.iterdir())


def test_a_file_of_the_body_that_the_disk_does_not_take_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        run(tmp_path, lambda exp: nothing_traced(tmp_path / "file" / "trace", "of the test"))
    assert end.value.code == 1 and not list(tmp_path.glob("streaming/*"))
    told = (tmp_path / "log").read_text()
    assert f"ERROR djinn.experiment: {tmp_path}/file/trace was not written: " in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("script", "words", "place"),
    [
        (streaming, "--system djinn_ans --out {file}.json --trace {file}/x", "x"),
        (streaming, "--system djinn_ans --out {file}.json --log {file}/x", "x"),
        (pressure, "--system djinn --out {file}/x.json", "pressure.log"),
    ],
)
def test_a_place_that_takes_no_file_is_one_line_before_anything_runs(
    script: Any, words: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(sys, "argv", f"script --run cpu {words.format(file=file)}".split())
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 1
    assert [record.getMessage().partition(" was not written: ")[0] for record in caplog.records] == [f"{file}/{place}"]
    assert not any(record.exc_info for record in caplog.records)


def test_a_log_that_the_disk_takes_no_more_is_told_once_and_stops_nothing(capsys: pytest.CaptureFixture) -> None:
    harness.start_logging(Path("/dev/full"))
    for _ in range(2):
        harness.log.info("more")
    assert capsys.readouterr().err == "/dev/full lacks lines from here on: No space left on device; make room\n"


def test_children_end_with_their_parent() -> None:
    code = (
        "import time; from workflow.lib import children\n"
        "with children.child(['sleep', '300']) as c: print(c.pid, flush=True); time.sleep(300)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert wait_gone(child)


def wait_gone(pid: int, timeout_s: float = 5.0) -> bool:
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_the_end_of_the_block_takes_the_whole_group() -> None:
    command = ["sh", "-c", 'trap "" TERM; sleep 300 & echo $!; wait']
    with children.child(command, stdout=subprocess.PIPE, text=True) as process:
        grandchild = int(process.stdout.readline())
        assert grandchild in children.descendants()
    assert wait_gone(grandchild)
    assert process.returncode is not None


JOB = """
import os, sys, time
from workflow.lib import children
children.terminate_cleanly()
children.follow_pipeline()
try:
    print(os.getpid(), flush=True)
    time.sleep(300)
finally:
    open(sys.argv[1], "w").write("clean")
"""


def pipeline(job: str, *arguments: str) -> subprocess.Popen[str]:
    """A process that is the pipeline, and starts a job through a shell, which prints its number."""
    code = (
        "import shlex, subprocess, sys; from workflow.lib import children; children.name_pipeline()\n"
        "subprocess.run(shlex.join([sys.executable, '-c', *sys.argv[1:]]) + '; true', shell=True)"
    )
    command = [sys.executable, "-c", code, job, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_an_experiment_ends_with_its_pipeline(tmp_path: Path) -> None:
    """What a killed pipeline had started through a shell ends too, its cleanup done."""
    with pipeline(JOB, str(tmp_path / "ended")) as killed:
        experiment = int(killed.stdout.readline())
        os.kill(killed.pid, signal.SIGKILL)
        assert wait_gone(experiment)
    assert (tmp_path / "ended").read_text() == "clean"


def test_a_job_whose_pipeline_has_ended_before_it_came_so_far_does_nothing(tmp_path: Path) -> None:
    late = f"import os, time; print(os.getpid(), flush=True); time.sleep(1)\n{JOB}"
    with pipeline(late, str(tmp_path / "ended")) as killed:
        assert int(killed.stdout.readline())
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        said = killed.stdout.read()
    assert "the pipeline that started this has ended: nothing was done" in said
    assert not (tmp_path / "ended").exists()


def test_the_sampler_sees_memory_come_and_go() -> None:
    size_bytes = 200 << 20
    with MemorySampler(hz=50) as sampler:
        time.sleep(0.2)
        block = torch.ones(size_bytes, dtype=torch.uint8)
        time.sleep(0.2)
        del block
        time.sleep(0.2)
    first, last = sampler.rows[0]["host_bytes"], sampler.rows[-1]["host_bytes"]
    assert sampler.peak_host_bytes - first == pytest.approx(size_bytes, rel=0.1)
    assert last - first < size_bytes / 4
    assert sampler.peak_device_bytes is None
    times = [row["t_s"] for row in sampler.rows]
    assert times == sorted(times)
    assert len(times) >= 10


def test_the_digest_covers_what_an_experiment_imports_and_nothing_else(tmp_path: Path) -> None:
    for name, text in {
        "workflow/__init__.py": "",
        "workflow/scripts/__init__.py": "",
        "workflow/scripts/demo.py": "def main():\n    from djinn_core.memory import pool\n",
        "workflow/scripts/demo_parts/one.py": "from workflow.lib import harness\n",
        "workflow/scripts/other.py": "",
        "workflow/lib/__init__.py": "",
        "workflow/lib/harness.py": "import djinn_core\n",
        "workflow/lib/figures.py": "",
        "djinn_core/__init__.py": "from .lazy import x\nTABLE = {'late': 'djinn_core.late'}\n",
        "djinn_core/lazy.py": "",
        "djinn_core/late.py": "",
        "djinn_core/unused.py": "",
        "djinn_core/memory/__init__.py": "",
        "djinn_core/memory/pool.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    code = identity.code_of("demo", tmp_path)
    assert {"workflow/scripts/demo.py", "workflow/scripts/demo_parts/one.py", "djinn_core/memory/pool.py"} <= set(code)
    assert {"djinn_core/lazy.py", "djinn_core/late.py", "workflow/lib/harness.py"} <= set(code)
    assert not {"djinn_core/unused.py", "workflow/lib/figures.py", "workflow/scripts/other.py"} & set(code)
    before = identity.code_digest("demo", tmp_path)
    (tmp_path / "djinn_core/unused.py").write_text("x = 1\n")
    assert identity.code_digest("demo", tmp_path) == before
    (tmp_path / "djinn_core/memory/pool.py").write_text("x = 1\n")
    assert identity.code_digest("demo", tmp_path) != before
    assert identity.source_of("demo", tmp_path)["commit"] is None


def test_git_is_reported_and_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_git = identity.source_of("certify")
    assert with_git["commit"] is None or len(with_git["commit"]) == 40
    monkeypatch.setenv("PATH", "/nowhere")
    assert shutil.which("git") is None
    assert identity.source_of("certify") == {"commit": None, "dirty": None, "digest": with_git["digest"]}
