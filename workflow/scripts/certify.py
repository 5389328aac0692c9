"""The machine's certificate: what its links can do, and whether to trust it.

python -m workflow.scripts.certify --run cpu --out results/cpu/certificate.json
"""

from __future__ import annotations

import logging
import time

from djinn_core import certificate
from djinn_core.errors import DjinnError
from workflow.lib import harness, identity
from workflow.lib.config import section
from workflow.lib.progress import Progress
from workflow.lib.results import summary_of, validate, write_json

SCHEMA = "djinn-certificate/1"
log = logging.getLogger("djinn.certify")


def main() -> None:
    args = harness.arguments("certify")
    settings = harness.begin(args)
    config = section(settings, "certify")
    device = config["machine"]["device"]
    began_s = time.monotonic()
    with harness.lock_of(device):
        harness.equal_conditions(config)
        try:
            with Progress("certify").task("measure the machine"):
                found = certificate.measure(device, config, config["machine"], args.out.parent)
        except (DjinnError, OSError) as error:
            log.error("the machine was not measured, and no certificate was written: %s", error)
            raise SystemExit(1) from error
    document = found.document() | {
        "schema": SCHEMA,
        "run": args.run,
        "source": identity.source_of("certify"),
        "libraries": identity.libraries(),
        "config": config,
        "summary": summary_of(found.samples),
    }
    validate(document, "certificate", str(args.out))
    with harness.written():
        write_json(args.out, document)
    for line in found.lines:
        level = logging.WARNING if line.verdict == "fail" else logging.INFO
        log.log(level, "%s %s: %s %s (%s)", line.verdict, line.name, line.value, line.unit, line.threshold)
    log.info("certificate: %s in %.1f s, in %s", found.verdict, time.monotonic() - began_s, args.out)


if __name__ == "__main__":
    main()
