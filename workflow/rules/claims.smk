from workflow.lib.claimfiles import CLAIMS, input_files, load_claims
from workflow.lib.results import ResultError

try:
    CLAIMED = input_files(load_claims(CLAIMS))
except ResultError as error:
    raise WorkflowError(str(error)) from error


rule claims:
    """Judge every claim from the result files. A missed bar is a verdict in the table and stops nothing."""
    input:
        claims="config/claims.yaml",
        schema="workflow/schemas/claims.schema.json",
        certificate=f"results/{RUN}/certificate.json",
        results=[
            f"results/{RUN}/{name}"
            for name in CLAIMED
            if is_measured(name.split("/")[0])
        ],
        code=code_of("claims"),
    output:
        verdicts=f"results/{RUN}/claims.json",
        table=f"results/{RUN}/claims.md",
    log:
        f"results/{RUN}/logs/claims.log",
    conda:
        "../../envs/figures.yaml"
    params:
        folder=results_folder,
    shell:
        f"python -m workflow.scripts.claims --results {{params.folder}} --claims {{input.claims}}"
        f" --out {{output.verdicts}} --table {{output.table}}{LOGGED}"
