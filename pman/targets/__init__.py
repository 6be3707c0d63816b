"""What particular schedulers want: one file for each target says all that pman knows of it, in a `Target` record.

To change how a target is quoted, judged or read back, change its file; to add one, write a file and add a row below.
Nothing else in pman lists targets: commands, checks, pages and tests read TARGETS.
"""

from collections.abc import Mapping

from pman.targets import docker, documents, kubernetes, local, slurm, swarm, wdl
from pman.targets.record import Judging, Problem, Target
from pman.templating.render import Spec

_ROWS = (wdl.TARGET, kubernetes.TARGET, swarm.TARGET, docker.TARGET, slurm.TARGET, local.TARGET)
TARGETS: Mapping[str, Target] = {target.name: target for target in _ROWS}
_JUDGING = Judging()


def judge(spec: Spec, how: Judging = _JUDGING) -> list[Problem]:
    """What is wrong with a spec and what goes with it; [] when its language accepts it.

    Raises Misconfigured where the parser of its language is not installed.
    """
    found = list(TARGETS[spec.target].judge(spec.text, how))
    for name, text in spec.extras.items():
        found += [Problem(p.message, p.line, name) for p in documents.json_problems(text)]
    return found
