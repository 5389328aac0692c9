# Djinn's experiments: certify the machine, measure, draw, judge.
#
#   snakemake --cores 1 all                          everything, in the preset that fits this machine
#   snakemake paper_figures/fig5.pdf                 one file; profiles/default gives the cores
#   snakemake --cores 1 --config run=h200 streaming  one experiment, in a preset by name
#
# What is measured is in config/, how it is run is in profiles/.
from snakemake.utils import min_version

min_version("9.17")


configfile: "config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/certify.smk"


rule all:
    """Everything that there are rules for, in this run."""
    default_target: True
    input:
        rules.certify.input,
