from workflow.lib.systems import PRESSURE_SYSTEMS


rule pressure:
    """Experiment 3, memory pressure: more sessions than the cap holds."""
    input:
        expand("results/{run}/pressure/{system}.json", run=RUN, system=PRESSURE_SYSTEMS),


rule pressure_reference:
    """What an unpaused stock model says to every session's prompt."""
    input:
        code=code_of("pressure"),
        certificate="results/{run}/certificate.json",
    output:
        "results/{run}/pressure/reference.json",
    log:
        "results/{run}/logs/pressure_reference.log",
    conda:
        "../../envs/experiments.yaml"
    threads: ALL_CORES
    params:
        settings=settings("pressure"),
    shell:
        "python -m workflow.scripts.pressure --run {wildcards.run} --system reference --out {output} --log {log}"


rule pressure_system:
    """One system under the demand of all sessions."""
    input:
        code=code_of("pressure"),
        reference="results/{run}/pressure/reference.json",
    output:
        "results/{run}/pressure/{system}.json",
    log:
        "results/{run}/logs/pressure_{system}.log",
    wildcard_constraints:
        system="|".join(system for system in PRESSURE_SYSTEMS if system != "djinn"),
    conda:
        "../../envs/experiments.yaml"
    threads: ALL_CORES
    params:
        settings=settings("pressure"),
    shell:
        "python -m workflow.scripts.pressure --run {wildcards.run} --system {wildcards.system} --out {output} --log {log}"


rule pressure_djinn:
    """Djinn under the cap, with its log of every event."""
    input:
        code=code_of("pressure"),
        reference="results/{run}/pressure/reference.json",
    output:
        result="results/{run}/pressure/djinn.json",
        events="results/{run}/pressure/pressure.log",
    log:
        "results/{run}/logs/pressure_djinn.log",
    conda:
        "../../envs/experiments.yaml"
    threads: ALL_CORES
    params:
        settings=settings("pressure"),
    shell:
        "python -m workflow.scripts.pressure --run {wildcards.run} --system djinn --out {output.result} --log {log}"
