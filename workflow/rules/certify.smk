rule certify:
    """The certificate of this machine, in the run's preset."""
    input:
        f"results/{RUN}/certificate.json",


# Rules that measure take the certificate as a plain input. As `ancient(...)` it would lose them: Snakemake 9.27 drops a
# job, its outputs missing or not, when the job behind its ancient input has to run.
rule certificate:
    """What the machine's links, host memory and disk can do, with a verdict per line."""
    input:
        code=code_of("certify"),
    output:
        certificate="results/{run}/certificate.json",
    log:
        "results/{run}/logs/certify.log",
    conda:
        "../../envs/experiments.yaml"
    threads: ALL_CORES
    params:
        settings=settings("certify"),
    shell:
        "python -m workflow.scripts.certify --run {wildcards.run} --out {output.certificate} --log {log}"
