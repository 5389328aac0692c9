"""The systems of each experiment by the names of their files, in the order in which tables and figures show them."""

from __future__ import annotations

STREAMING_GROUPS = {
    "nothing resident": (
        "accelerate_cpu_offload",
        "deepspeed_cpu",
        "deepspeed_cpu_tuned",
        "deepspeed_nvme",
        "djinn_chunk16mib",
        "djinn_chunk64mib",
        "djinn_chunk128mib",
        "djinn_chunk512mib",
        "djinn_ans",
    ),
    "cap filled": ("accelerate_device_map", "djinn_resident"),
}
STREAMING_SYSTEMS = tuple(system for group in STREAMING_GROUPS.values() for system in group)
RESUME_METHODS = (
    "eager",
    "recompute",
    "manual_offload_pageable",
    "manual_offload_pinned",
    "manual_offload_overlapped",
    "djinn",
)
PRESSURE_SYSTEMS = ("eager", "manual_offload", "djinn", "djinn_uncapped")
# by experiment, with the reference that the others are compared with: what --system takes
SYSTEMS = {
    "streaming": ("reference", *STREAMING_SYSTEMS),
    "resume": RESUME_METHODS,
    "pressure": ("reference", *PRESSURE_SYSTEMS),
}
