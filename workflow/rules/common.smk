# What the rules share: which run this is, its settings, and the code behind a result.
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

sys.path.insert(0, str(workflow.basedir))

from workflow.lib import children, identity
from workflow.lib.config import (
    SettingsError,
    canonical,
    check_command_line,
    load_config,
    run_of,
)
from workflow.lib.stalelock import remove_stale_locks


def settings_of(run):
    """The checked settings of a run; a wrong one ends Snakemake with one line."""
    try:
        check_command_line(config)
        return load_config(run)
    except SettingsError as error:
        raise WorkflowError(str(error)) from error


def this_run():
    """The name of the run; a configuration that names none ends Snakemake with one line."""
    try:
        return run_of(config)
    except SettingsError as error:
        raise WorkflowError(str(error)) from error


def code_of(experiment):
    """Inputs of a measuring rule: the experiment's scripts and all of this repository that they import."""
    return identity.code_of(experiment)


def settings(experiment):
    """A parameter that changes when, and only when, the settings of this experiment in its run do."""

    def parameter(wildcards):
        try:
            return canonical(settings_of(wildcards.run), experiment)
        except SettingsError as error:
            raise WorkflowError(str(error)) from error

    return parameter


def is_measured(experiment):
    """Whether this run has results of this experiment: its preset has a section for it."""
    return experiment in SETTINGS


def result_files(experiment, systems):
    """The result files of these systems in this run."""
    return [f"results/{RUN}/{experiment}/{system}.json" for system in systems]


def results_folder(wildcards, input):
    """The folder of a whole run, where its certificate lies."""
    return str(Path(input.certificate).parent)


remove_stale_locks(Path.cwd())
children.name_pipeline()
RUN = this_run()
SETTINGS = settings_of(RUN)
# Rules that measure take all cores that Snakemake has, so that no two of them ever run beside each other.
ALL_CORES = workflow.cores or 1
# The end of a command that keeps no log of its own: all that it prints goes to the rule's log, with what it wrote and how
# long that took; it is shown if the command fails.
LOGGED = ' > {log} 2>&1 && echo "wrote {output} in $SECONDS s" >> {log} || {{ cat {log} >&2; exit 1; }}'


wildcard_constraints:
    run="[a-z0-9_]+",
    system="[a-z0-9_]+",
