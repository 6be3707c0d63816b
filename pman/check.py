"""Judges rendered specs with the real parser or schema of their language."""

from __future__ import annotations

from pman.render import Spec


def judge(spec: Spec) -> list[str]:
    """What is wrong with a spec, one sentence each; [] when its language accepts it."""
    raise NotImplementedError(spec.target)
