from workflow.lib.systems import RESUME_METHODS


rule resume:
    """Experiment 3, resume latency: every method, each in a file of its own."""
    input:
        expand("results/{run}/resume/{system}.json", run=RUN, system=RESUME_METHODS),


rule resume_method:
    """One method, interleaved with those that it is compared with."""
    input:
        code=code_of("resume"),
        certificate="results/{run}/certificate.json",
    output:
        "results/{run}/resume/{system}.json",
    log:
        "results/{run}/logs/resume_{system}.log",
    conda:
        "../../envs/experiments.yaml"
    threads: ALL_CORES
    params:
        settings=settings("resume"),
    shell:
        "python -m workflow.scripts.resume --run {wildcards.run} --system {wildcards.system} --out {output} --log {log}"
