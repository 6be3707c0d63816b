"""The commands and templates of the pages that are not run as a whole (test_docs.py), each as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import requests

from pman import settings
from pman.backends import BACKENDS
from pman.service.auth import Users
from tests.rig import ROOT, wait_for
from tests.scripts.test_docs import PAGES as ALL_PAGES
from tests.scripts.test_docs import blocks

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs" / f"{name}.md" for name in (
    "operators", "developers", "slurm", "cromwell", "kubernetes", "swarm", "runtimes",
))]  # fmt: skip
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis")


def commands(page: Path) -> list[str]:
    """The lines of its `sh` blocks, without their comments; a block that exports variables is one command."""
    found = []
    for _, text in blocks(page, "sh"):
        lines = [re.sub(r"\s+# .*", "", line.strip()) for line in text.splitlines()]
        found += ["\n".join(lines)] if lines[0].startswith("export ") else lines
    return found


def run(command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env={"PATH": PATH, "HOME": os.environ["HOME"], "LANG": "C.UTF-8"} | env, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The project as somebody gets it: nothing installed."""
    return Path(shutil.copytree(ROOT, tmp_path / "checkout", ignore=NOT_COPIED))


def quickstart(command: str, checkout: Path) -> None:
    shown = run(command, checkout, PATH=os.environ["PATH"])
    assert shown.count("finishedSuccessfully") >= len(list((ROOT / "examples").glob("*.json")))
    assert (checkout / ".venv").is_dir()


def installs(command: str, checkout: Path) -> None:
    """From a wheel, with its templates and examples."""
    run(f"{sys.executable} -m venv fresh", checkout)
    path = f"{checkout}/fresh/bin:{os.environ['PATH']}"
    run(command, checkout, PATH=path)
    assert run("pman settings", checkout, PATH=path) == settings.markdown_table(BACKENDS)
    rendered = run("pman render examples/copy-and-hash.json --to k8s", checkout, PATH=path, STOREBASE="/data")
    assert "kind: Job" in rendered
    run("pman examples copied", checkout, PATH=path)
    assert (checkout / "copied/sites/README.md").read_bytes() == (ROOT / "examples/sites/README.md").read_bytes()
    assert not (checkout / "copied/__pycache__").exists()


def serves(command: str, checkout: Path) -> None:
    env = {"PATH": PATH, "HOME": str(checkout), "PORT": "0", "PYTHONPATH": str(ROOT)}
    log = checkout / "log"
    with log.open("wb") as out, subprocess.Popen(["bash", "-c", f"{command} & wait"], env=env, stderr=out) as shell:
        try:
            url = wait_for(lambda: re.search(r"listening on (\S+)", log.read_text().replace('"', " ")), 60, "pman")[1]
            assert requests.get(f"{url}/api/v1/", timeout=10).json()["container_env"] in command
        finally:
            children = Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
            subprocess.run(["kill", *children], check=True)


def settles(command: str, checkout: Path) -> None:
    """These settings let a service start."""
    check = "from pman import backends, settings; backends.check_for_service(settings.load())"
    run(f"{command}\n{sys.executable} -c '{check}'", checkout, SECRET_KEY="x" * 20, PYTHONPATH=str(ROOT))


def renders(command: str, checkout: Path) -> None:
    assert run(command, checkout).startswith("version 1.0\n")


def collects(command: str, _: Path) -> None:
    """The tests are run by others; here it is lint, types and what would be run."""
    assert "tests/" in run(command, ROOT, PYTEST_ADDOPTS="--collect-only -q")


def makes_a_user(command: str, checkout: Path) -> None:
    run(command, checkout)
    users = Users(checkout / "users", 1)
    assert users.allow("chris", "a long password")
    assert not users.allow("chris", "another one")


CHECKS: Mapping[str, Callable[[str, Path], None]] = {
    "scripts/quickstart": quickstart,
    "scripts/render_job.py examples/copy-and-hash.json --to wdl": renders,
    "scripts/test --fast": collects,
    "scripts/test -k quote": collects,
    "scripts/test tests/service/test_http.py": collects,
    "scripts/test tests/live/test_slurm.py": collects,
    "pip install .": installs,
    'htpasswd -niB chris <<<"a long password" >>users': makes_a_user,
}
# command -> the file that runs it, and how it is called there
ELSEWHERE = {
    "kubectl apply -k deploy/kubernetes": ("tests/live/kubernetes/test_deployments.py", '"apply", f"--kustomize='),
    "helm install chris deploy/helm --set pman.image.repository=registry.example.org/pman --set pman.image.tag=7": (
        "tests/live/kubernetes/test_deployments.py",
        'cluster.helm("install", *arguments',
    ),
    "pman images pull docker.io/fnndsc/pl-simpledsapp:2.1.0": ("tests/cli/test_images.py", '"pull", IMAGE'),
    "scripts/test": (".ci/run", "scripts/test"),
    "gunicorn --bind 0.0.0.0:5010 --threads 40 pman.wsgi:application": (
        "tests/service/test_wsgi.py",
        '*options, "pman.wsgi:application"',
    ),
    "scripts/dev": ("tests/live/test_dev.py", "scripts/dev"),
    "scripts/dev --on slurm": ("tests/live/test_dev.py", '"--on", name'),
    "scripts/chaos local --minutes 1": ("tests/live/test_chaos.py", '"chaos"), backend, "--minutes"'),
    "scripts/smoke http://127.0.0.1:5010": ("tests/live/test_dev.py", "scripts/smoke"),
}
FOUND = [(page.name, command) for page in PAGES for command in commands(page)]


def check_of(command: str) -> Callable[[str, Path], None] | None:
    if command.startswith("export "):
        return serves if command.endswith("\npman serve") else settles
    return CHECKS.get(command)


HERE = [(page, command) for page, command in FOUND if command not in ELSEWHERE]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), HERE, ids=[f"{page}: {command[:40]}" for page, command in HERE])
def test_a_command_does_what_is_said(page: str, command: str, checkout: Path) -> None:
    check = check_of(command)
    assert check, f"nothing runs `{command}` of {page}: add it to CHECKS or ELSEWHERE"
    check(command, checkout)


@pytest.mark.parametrize("command", ELSEWHERE)
def test_other_commands_are_run_where_it_is_said(command: str) -> None:
    file, words = ELSEWHERE[command]
    assert command in {found for _, found in FOUND}
    assert words in (ROOT / file).read_text()


# Commands inside a sentence that are run here, and what they then say.
OFFLINE = {
    "pman check examples/sites/*/": "",  # exit status 0, and silence
    "pman templates list": "wdl/job.wdl.j2",
    "pman completion bash": "_PMAN_COMPLETE",
    "pman help exit-codes": "the job reached its time limit",
    "pman templates show wdl/job.wdl.j2": "workflow ChRISJob",
}
# Others -> where they are run, and how they are called there.
INLINE = {
    "docker build -f deploy/Dockerfile -t localhost/pman:7 .": ("tests/live/test_deploy.py", "BUILD)"),
    "docker compose -f deploy/compose.yml up": ("tests/live/test_deploy.py", '"deploy/compose.yml", project'),
    "docker compose -f deploy/compose.slurm.yml up": ("tests/live/test_deploy.py", '"deploy/compose.slurm.yml", env'),
    "docker compose -f compose.dev.yml up": ("tests/live/test_deploy.py", '"compose.dev.yml", project'),
    "docker stack deploy -c deploy/compose.yml pman": ("tests/live/test_deploy.py", "docker stack deploy -c"),
    "scripts/test --python python3.12": ("scripts/test", "scripts/test --python /usr/bin/python3"),
    "scripts/test_swarm.sh --existing": ("tests/live/test_deploy.py", 'scripts/test_swarm.sh {option}"'),
    'eval "$(scripts/engines/swarm env)"': ("scripts/test_swarm.sh", 'eval "$(scripts/engines/swarm env)"'),
    "scripts/engines/swarm up": ("scripts/test_swarm.sh", "scripts/engines/swarm up"),
    "scripts/engines/swarm start registry": ("tests/live/engine_cases.py", '("start", "registry")'),
    "scripts/engines/podman up": ("scripts/test", 'scripts/engines/"$name" up'),
    "python -m tests.scripts.test_docs": ("tests/test_new_backend.py", '"-m", "tests.scripts.test_docs"'),
    "pman list --watch": ("tests/cli/test_client.py", '"list", "--watch"'),
    "pman templates diff": ("docs/templates.md", "$ pman templates diff --templates site"),
    "pman templates upgrade-check": ("docs/templates.md", "$ pman templates upgrade-check old"),
    "pman images list": ("tests/cli/test_images.py", '"list", "--directory"'),
    "pman check --live site": ("tests/live/test_check_live.py", '"--live"'),
    "pman templates new site --for slurm --from-cluster": (
        "tests/live/test_check_live.py",
        '"slurm", "--from-cluster"',
    ),
    "pman render request.json --to wdl --templates site --watch": (
        "tests/cli/test_templates.py",
        '"--watch", "--templates"',
    ),
    **dict.fromkeys(
        re.findall(r"`(python bench/[^`]*)`", "".join(page.read_text() for page in ALL_PAGES)),
        ("tests/live/test_bench.py", 'f"bench/{script}", *arguments'),
    ),
}
SAYING = [*ALL_PAGES, ROOT / "deploy/Dockerfile", *ROOT.glob("*compose*.yml"), *ROOT.glob("deploy/compose*.yml")]
COMMAND = re.compile(r"`((?:pman|docker|kubectl|systemctl|python|pip|scripts/[\w./-]+|eval) [^`\n]+)`")


def test_commands_in_sentences_are_run_where_it_is_said() -> None:
    texts = [re.sub(r"(?ms)^ *```.*?^ *```$", "", path.read_text()) for path in SAYING]
    said = {command for text in texts for command in COMMAND.findall(text)}
    # what has a word of capitals for something to be filled in stands for many commands; two words name one
    whole = {command for command in said if not re.search(r"\b[A-Z]{3,}\b|<\w+>|^(pman|docker) \w+$", command)}
    assert whole == set(INLINE) | set(OFFLINE)
    for command, (file, words) in INLINE.items():
        assert words in (ROOT / file).read_text(), command


@pytest.mark.slow
@pytest.mark.parametrize("command", OFFLINE)
def test_a_command_in_a_sentence(command: str) -> None:
    assert OFFLINE[command] in run(command, ROOT)


OVERLAYS = [(page.name, text) for page in PAGES for _, text in blocks(page, "jinja")]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "text"), OVERLAYS, ids=[page for page, _ in OVERLAYS])
def test_a_template_of_a_page_passes_the_check(page: str, text: str, tmp_path: Path) -> None:
    name = re.search(r'{% extends "shipped/(\S+)" %}', text)
    assert name
    template = tmp_path / name[1]
    template.parent.mkdir(parents=True)
    template.write_text(text)
    values = sorted(set(re.findall(r"\bsite\.(\w+)", text)))
    (tmp_path / "site.yaml").write_text("".join(f"{value}: a-word\n" for value in values))
    command = [sys.executable, "-m", "pman", "check", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
