"""Block `doctor`: every variant of every kernel on this device, and what the check at first use costs.

`first use` is `bench.small`, two training steps and a sampling of a small model, in a process without verdicts, and
`later` the same with those that it kept.
"""

import os
import subprocess
import sys
import time

from bench.gpu.lab import Lab
from encdiff.health import kernels


def measure(lab: Lab) -> dict:
    found: dict = {"findings": []}
    if not lab.cpu:
        environment = os.environ | {"ENCDIFF_SELF_CHECK": "1", "XDG_CACHE_HOME": str(lab.out / "self-check")}
        for name in ("compiled before", "first use", "later"):
            checked = environment | ({"ENCDIFF_SELF_CHECK": "0"} if name == "compiled before" else {})
            begin = time.monotonic()
            done = subprocess.run([sys.executable, "-m", "bench.small"], env=checked, capture_output=True, text=True)
            said = [line for line in done.stderr.splitlines() if line.startswith("encdiff:")]
            found[name] = {"seconds": time.monotonic() - begin, "code": done.returncode, "said": said[:20]}
            lab.save("doctor", found)

    def add(finding, done: int, total: int) -> None:
        found["findings"].append(finding._asdict())
        found["of"] = total
        if done % 20 == 0:
            lab.save("doctor", found)

    names = ["adamw"] if lab.cpu else list(kernels.families(lab.device))
    kernels.check_all(lab.device, names, add)
    return found


def lines(found: dict) -> list[str]:
    findings = found.get("findings", [])
    wrong = [f for f in findings if f["wrong"]]
    said = [f"{name}: {r['seconds']:.1f} s, exit code {r['code']}, {'; '.join(r['said'])[:200]}"
            for name, r in found.items() if isinstance(r, dict)]  # fmt: skip
    said.append(f"{len(findings)} of {found.get('of', '?')} checks made, {len(wrong)} wrong")
    return said + [f"WRONG {f['family']} {f['variant']}: {'; '.join(f['wrong'])}" for f in wrong[:20]]
