# Djinn's experiments: certify the machine, measure, draw, judge.
#
#   snakemake --cores 1 all                          everything, in the preset that fits this machine
#   snakemake paper_figures/fig5.pdf                 one file; profiles/default gives the cores
#   snakemake --cores 1 streaming --config run=h200  one experiment, in a preset by name
#
# What is measured is in config/, how it is run is in profiles/. The rules are in workflow/rules/, one file for each
# experiment; an experiment takes part when its file is there and the preset has a section for it. config/config.yaml is
# read by workflow/lib/config.py, which says what is wrong in it; Snakemake's own reader would not.
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version

min_version("9.20")

if not Path(workflow.basedir).samefile(Path.cwd()):
    raise WorkflowError(
        f"the working directory is {Path.cwd()}; paths are relative to the repository: run from its root, "
        f"{workflow.basedir}, or with --directory {workflow.basedir}"
    )


include: "workflow/rules/common.smk"
include: "workflow/rules/certify.smk"


EXPERIMENTS = ["streaming", "resume", "pressure"]
MEASURED = [name for name in EXPERIMENTS if is_measured(name)]
DRAWN = {
    "streaming": ["fig5", "report"],
    "resume": ["fig7", "table1"],
    "pressure": ["fig6", "memory_breakdown"],
}

for name in EXPERIMENTS:

    include: f"workflow/rules/{name}.smk"


include: "workflow/rules/figures.smk"
include: "workflow/rules/claims.smk"


rule figures:
    """Every figure and table of this run, drawn from its result files."""
    input:
        [
            getattr(rules, drawn).output
            for name in MEASURED
            for drawn in DRAWN.get(name, [])
        ],


rule all:
    """Everything that this run's preset measures."""
    default_target: True
    input:
        rules.certify.input,
        [getattr(rules, name).input for name in MEASURED],
        rules.figures.input,
        rules.claims.output,
