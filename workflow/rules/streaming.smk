from workflow.lib.systems import STREAMING_SYSTEMS


rule streaming:
    """Experiment 2 in this run: every system of both groups."""
    input:
        [f"results/{RUN}/streaming/{system}.json" for system in STREAMING_SYSTEMS],


rule streaming_reference:
    """The resident stock model: the tokens and logits that every system must repeat bit for bit."""
    input:
        code=code_of("streaming"),
        certificate="results/{run}/certificate.json",
    output:
        result="results/{run}/streaming/reference.json",
        answers="results/{run}/streaming/reference.safetensors",
    log:
        "results/{run}/logs/streaming_reference.log",
    conda:
        "../../envs/experiments.yaml"
    threads: ALL_CORES
    params:
        settings=settings("streaming"),
    shell:
        "python -m workflow.scripts.streaming --run {wildcards.run} --system reference"
        " --out {output.result} --log {log}"


rule streaming_system:
    """One system, measured like every other, with nvidia-smi's own trace beside it."""
    input:
        code=code_of("streaming"),
        grid="config/deepspeed_grid.yaml",
        reference="results/{run}/streaming/reference.json",
        answers="results/{run}/streaming/reference.safetensors",
    output:
        result="results/{run}/streaming/{system}.json",
        trace="results/{run}/streaming/dmon_{system}.csv",
    log:
        "results/{run}/logs/streaming_{system}.log",
    wildcard_constraints:
        system="|".join(STREAMING_SYSTEMS),
    conda:
        "../../envs/experiments.yaml"
    threads: ALL_CORES
    params:
        settings=settings("streaming"),
    shell:
        "python -m workflow.scripts.streaming --run {wildcards.run} --system {wildcards.system}"
        " --out {output.result} --trace {output.trace} --log {log}"
