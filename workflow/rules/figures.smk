from pathlib import Path

from workflow.lib.systems import PRESSURE_SYSTEMS, RESUME_METHODS, STREAMING_SYSTEMS

PLOTTING = [
    "workflow/plots/style.py",
    "workflow/plots/load.py",
    "workflow/lib/results.py",
    "workflow/lib/stats.py",
    "workflow/lib/systems.py",
]


rule fig5:
    """Streaming: the rate of the link, the time of a pass, the first token, the sizes of a chunk."""
    input:
        results=result_files("streaming", STREAMING_SYSTEMS),
        certificate=f"results/{RUN}/certificate.json",
        code=["workflow/plots/fig5.py", *PLOTTING],
    output:
        pdf="paper_figures/fig5.pdf",
        numbers="paper_figures/fig5.csv",
    log:
        f"results/{RUN}/logs/fig5.log",
    conda:
        "../../envs/figures.yaml"
    params:
        folder=results_folder,
    shell:
        "python -m workflow.plots.fig5 --results {params.folder} --out {output.pdf} --csv {output.numbers}"
        + LOGGED


rule report:
    """Streaming: the comparison as a table, with the targets and what was measured of them."""
    input:
        results=result_files("streaming", STREAMING_SYSTEMS),
        certificate=f"results/{RUN}/certificate.json",
        claims="config/claims.yaml",
        schema="workflow/schemas/claims.schema.json",
        code=code_of("report"),
    output:
        text=f"results/{RUN}/streaming/report.md",
        numbers=f"results/{RUN}/streaming/report.csv",
    log:
        f"results/{RUN}/logs/report.log",
    conda:
        "../../envs/figures.yaml"
    params:
        folder=results_folder,
    shell:
        "python -m workflow.scripts.report --results {params.folder} --claims {input.claims} --out {output.text}"
        + LOGGED


rule fig6:
    """Memory pressure: device memory against sessions and time, the demand, the cap."""
    input:
        results=result_files("pressure", PRESSURE_SYSTEMS),
        certificate=f"results/{RUN}/certificate.json",
        code=["workflow/plots/fig6.py", *PLOTTING],
    output:
        pdf="paper_figures/fig6.pdf",
        numbers="paper_figures/fig6.csv",
    log:
        f"results/{RUN}/logs/fig6.log",
    conda:
        "../../envs/figures.yaml"
    params:
        folder=results_folder,
    shell:
        "python -m workflow.plots.fig6 --results {params.folder} --out {output.pdf} --csv {output.numbers}"
        + LOGGED


rule fig7:
    """Resume latency against depth, both end points, with the bound that the link sets."""
    input:
        results=result_files("resume", RESUME_METHODS),
        certificate=f"results/{RUN}/certificate.json",
        code=["workflow/plots/fig7.py", *PLOTTING],
    output:
        pdf="paper_figures/fig7.pdf",
        numbers="paper_figures/fig7.csv",
    log:
        f"results/{RUN}/logs/fig7.log",
    conda:
        "../../envs/figures.yaml"
    params:
        folder=results_folder,
    shell:
        "python -m workflow.plots.fig7 --results {params.folder} --out {output.pdf} --csv {output.numbers}"
        + LOGGED


rule table1:
    """What each method costs: latency, sessions at the cap, edits, the code its user writes."""
    input:
        results=result_files("resume", RESUME_METHODS),
        pressure=(
            result_files("pressure", PRESSURE_SYSTEMS)
            if is_measured("pressure")
            else []
        ),
        certificate=f"results/{RUN}/certificate.json",
        methods=sorted(
            str(path) for path in Path("workflow/scripts/resume_methods").glob("*.py")
        ),
        code=["workflow/plots/table1.py", *PLOTTING],
    output:
        markdown="paper_figures/table1.md",
        latex="paper_figures/table1.tex",
        numbers="paper_figures/table1.csv",
    log:
        f"results/{RUN}/logs/table1.log",
    conda:
        "../../envs/figures.yaml"
    params:
        folder=results_folder,
    shell:
        "python -m workflow.plots.table1 --results {params.folder} --out {output.markdown}"
        + LOGGED


rule memory_breakdown:
    """Who holds the device's memory under pressure, from the ledger's own samples."""
    input:
        result=f"results/{RUN}/pressure/djinn.json",
        code=["workflow/scripts/memory_breakdown.py", *PLOTTING],
    output:
        text=f"results/{RUN}/pressure/memory_breakdown.md",
        numbers=f"results/{RUN}/pressure/memory_breakdown.csv",
    log:
        f"results/{RUN}/logs/memory_breakdown.log",
    conda:
        "../../envs/figures.yaml"
    shell:
        "python -m workflow.scripts.memory_breakdown --result {input.result} --out {output.text}"
        + LOGGED
