"""What is found wrong, as text for people and as JSON and SARIF for programs, each cause once."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pman.checking.overlay import Finding


def each_once(findings: Sequence[Finding]) -> Iterator[Finding]:
    """One finding for each cause, in the words of the first request that shows it, with the number of the others."""
    groups: dict[tuple[str, str, int, str], list[Finding]] = {}
    undefined = {(finding.file, finding.line) for finding in findings if finding.rule == "undefined"}
    for finding in findings:
        if finding.rule == "template" and (finding.file, finding.line) in undefined:
            continue  # the same name, met again while rendering
        cause = re.sub(r" \(request: [^()]*\)$", "", finding.message)
        if finding.rule == "changed":  # whatever it is instead
            cause = re.sub(r"\d+", "", re.split(r" is ['\"]|variable |^word ", cause, maxsplit=1)[0])
        if finding.rule == "invalid":  # parsers count the words of the request, and go on to quote it
            cause = re.sub(r"\d+", "", cause)[:40]
        groups.setdefault((finding.rule, finding.file, finding.line, cause), []).append(finding)
    for first, *more in groups.values():
        yield replace(first, message=f"{first.message} (and in {len(more)} more results)") if more else first


def to_json(findings: Sequence[Finding]) -> str:
    names = ("level", "rule", "file", "line", "column", "message")
    return json.dumps([{name: getattr(finding, name) for name in names} for finding in findings], indent=2)


def to_sarif(findings: Sequence[Finding], version: str) -> str:
    """The findings as SARIF 2.1.0 (docs.oasis-open.org/sarif/sarif/v2.1.0), which code hosts show beside the lines."""
    rules = [{"id": rule} for rule in sorted({finding.rule for finding in findings})]
    driver = {"name": "pman check", "version": version, "rules": rules}
    return json.dumps(
        {
            "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
            "version": "2.1.0",
            "runs": [{"tool": {"driver": driver}, "results": [_sarif(finding) for finding in findings]}],
        },
        indent=2,
    )


def _sarif(finding: Finding) -> dict[str, Any]:
    region = {"startLine": max(finding.line, 1)} | ({"startColumn": finding.column} if finding.column else {})
    place = {"artifactLocation": {"uri": Path(finding.file).as_posix()}, "region": region}
    return {
        "ruleId": finding.rule,
        "level": finding.level,
        "message": {"text": finding.message},
        "locations": [{"physicalLocation": place}],
    }
