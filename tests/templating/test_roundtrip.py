"""Whatever a request holds arrives at the program byte for byte, or is refused: every target, generated requests."""

from __future__ import annotations

import itertools
import posixpath
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pman import job, settings
from pman.errors import BadRequest
from pman.targets import TARGETS, kubernetes, swarm, wdl
from pman.templating import quote, render
from tests import deliver
from tests.deliver import PRINT_BOTH
from tests.generate import HOSTILE, IMAGES, TEXTS, requests

STORE = "/data/it's a $(store)"
_shells = itertools.cycle(("bash", "dash"))


class Target:
    """A renderer for one target, made once."""

    def __init__(self, name: str, **environment: str) -> None:
        self.name = name
        self.settings = settings.load({"STOREBASE": STORE, **environment})
        self.renderer = render.Renderer(self.settings, TARGETS)

    def __call__(self, request: dict[str, Any]) -> tuple[job.Job, render.Spec]:
        made = job.make_job(job.validate(request), self.settings)
        return made, self.renderer.render(made, self.name)


WDL, K8S, SWARM, DOCKER = (Target(name) for name in ("wdl", "k8s", "swarm", "docker"))
LOCAL = Target("local", LOCAL_RUNTIME="none")
SLURM = Target("slurm", SLURM_RUNTIME="none")


def expected_argv(request: dict[str, Any]) -> list[str]:
    tail = ["/share/incoming", "/share/outgoing"] if request["type"] == "ds" else ["/share/outgoing"]
    return [*request["entrypoint"], *request["args"], *tail]


def directory(request: dict[str, Any], name: str, store: str = STORE) -> str:
    default = {"input_dir": "incoming", "output_dir": "outgoing"}[name]
    return posixpath.join(store, posixpath.normpath(request.get(name, f"key-{request['jid']}/{default}")))


def unwritable_in_wdl(request: dict[str, Any]) -> bool:
    """WDL strings cannot carry a line break through Cromwell's configuration."""
    return any(c in request.get(name, "") for c in "\r\n" for name in ("input_dir", "output_dir"))


def check_wdl(request: dict[str, Any]) -> str | None:
    """The script that Cromwell makes, after its attributes were compared; None when the request is refused."""
    if unwritable_in_wdl(request):
        with pytest.raises(BadRequest):
            WDL(request)
        return None
    made, spec = WDL(request)
    runtime = deliver.wdl_runtime(spec.text)
    assert runtime["image"] == runtime["docker"] == request["image"]
    assert runtime["incoming"] == directory(request, "input_dir")
    assert runtime["outgoing"] == directory(request, "output_dir")
    assert runtime["jid"] == request["jid"]
    assert runtime["number_of_workers"] == request["number_of_workers"]
    assert runtime["cpu"] == -(-request["cpu_limit"] // 1000)
    assert runtime["memory"] == f"{request['memory_limit']} MiB"
    assert runtime["gpu_limit"] == request["gpu_limit"]
    assert runtime.get("timelimit") == request.get("time_limit_minutes") == made.time_limit_minutes
    assert runtime.get("slurm_partition") == request.get("partition")
    return deliver.cromwell_script(spec.text)


@pytest.mark.slow
@given(requests(entrypoint=PRINT_BOTH))
def test_wdl(request: dict[str, Any]) -> None:
    if script := check_wdl(request):
        env, arguments = deliver.both(deliver.run(script, next(_shells)))
        assert [*PRINT_BOTH, *arguments] == expected_argv(request)
        assert deliver.expected_env(request).items() <= env.items()


@given(requests())
def test_kubernetes(request: dict[str, Any]) -> None:
    made, spec = K8S(request)
    found = deliver.of_kubernetes(spec)
    assert found.argv == expected_argv(request)
    assert found.env == {"PMAN_WORKER_COUNT": str(request["number_of_workers"]), **deliver.expected_env(request)}
    assert (found.incoming, found.outgoing) == (directory(request, "input_dir"), directory(request, "output_dir"))
    assert found.image == request["image"]
    pod = found.fields["spec"]["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    gpus = request["gpu_limit"]
    assert limits == {
        "cpu": f"{request['cpu_limit']}m",
        "memory": f"{request['memory_limit']}Mi",
        **({"nvidia.com/gpu": gpus} if gpus else {}),
    }
    assert found.fields["spec"]["completions"] == found.fields["spec"]["parallelism"] == request["number_of_workers"]
    assert pod["activeDeadlineSeconds"] == request.get("time_limit_minutes", 10080) * 60
    annotations = found.fields["metadata"]["annotations"]
    assert annotations["org.chrisproject.pman.jid"] == request["jid"]
    assert annotations["org.chrisproject.pman.auid"] == request["auid"]
    assert found.fields["metadata"]["name"] == made.name


@given(requests())
def test_swarm(request: dict[str, Any]) -> None:
    _, spec = SWARM(request)
    found = deliver.of_swarm(spec)
    assert found.argv == expected_argv(request)
    assert found.env == {"PMAN_WORKER_COUNT": str(request["number_of_workers"]), **deliver.expected_env(request)}
    assert (found.incoming, found.outgoing) == (directory(request, "input_dir"), directory(request, "output_dir"))
    assert found.image == request["image"]
    assert found.fields["Labels"]["org.chrisproject.pman.name"] == request["jid"]
    limits = found.fields["TaskTemplate"]["Resources"]["Limits"]
    assert limits == {"NanoCPUs": request["cpu_limit"] * 10**6, "MemoryBytes": request["memory_limit"] << 20}
    assert found.fields["Mode"]["Replicated"]["Replicas"] == request["number_of_workers"]


@given(requests())
def test_docker(request: dict[str, Any]) -> None:
    _, spec = DOCKER(request)
    found = deliver.of_docker(spec)
    assert found.argv == expected_argv(request)
    assert found.env == {"PMAN_WORKER_COUNT": str(request["number_of_workers"]), **deliver.expected_env(request)}
    assert (found.incoming, found.outgoing) == (directory(request, "input_dir"), directory(request, "output_dir"))
    assert found.image == request["image"]
    assert found.fields["Labels"]["org.chrisproject.pman.name"] == request["jid"]
    host = found.fields["HostConfig"]
    assert (host["NanoCpus"], host["MemoryReservation"]) == (
        request["cpu_limit"] * 10**6,
        request["memory_limit"] << 20,
    )
    gpus = [item["Count"] for item in host.get("DeviceRequests", [])]
    assert gpus == ([request["gpu_limit"]] if request["gpu_limit"] else [])


def sbatch_options(text: str) -> dict[str, str]:
    """The #SBATCH lines as sbatch reads them: a backslash makes the next character stand for itself, quotes a blank."""
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    options = (re.sub(r'\\(.)|"( )"', lambda found: found[1] or found[2], line).partition("=") for line in lines)
    return {name: value for name, _, value in options}


@given(requests(entrypoint=PRINT_BOTH))
def test_slurm(request: dict[str, Any]) -> None:
    _, spec = SLURM(request)
    options = sbatch_options(spec.text)
    assert options["comment"] == f"org.chrisproject.pman.name={request['jid']}"
    assert options["ntasks"] == str(request["number_of_workers"])
    assert options.get("time") == (str(request["time_limit_minutes"]) if "time_limit_minutes" in request else None)
    assert options.get("partition") == request.get("partition")
    assert options["cpus-per-task"] == str(-(-request["cpu_limit"] // 1000))
    script = deliver.supervised(spec.text)
    expected = [on_host(word, request) for word in expected_argv(request)]
    env, arguments = deliver.both(deliver.run(script, "bash", "worker", SLURM_PROCID="0"))
    assert [*PRINT_BOTH, *arguments] == expected
    assert deliver.expected_env(request).items() <= env.items()


def on_host(word: str, request: dict[str, Any]) -> str:
    """Without a container there is no /share: a word that is a path below it names the directory itself."""
    for share, name in (("/share/incoming", "input_dir"), ("/share/outgoing", "output_dir")):
        if word == share or word.startswith(share + "/"):
            return directory(request, name) + word.removeprefix(share)
    return word


@pytest.mark.slow
@given(requests(entrypoint=PRINT_BOTH))
def test_local(request: dict[str, Any]) -> None:
    _, spec = LOCAL(request)
    env, arguments = deliver.both(deliver.run(deliver.supervised(spec.text), "bash", "claim", "1"))
    assert [*PRINT_BOTH, *arguments] == [on_host(word, request) for word in expected_argv(request)]
    wanted = {
        "PMAN_WORKER_INDEX": "0",
        "PMAN_WORKER_COUNT": str(request["number_of_workers"]),
        "PMAN_INCOMING": directory(request, "input_dir"),
        "PMAN_OUTGOING": directory(request, "output_dir"),
        **deliver.expected_env(request),
    }
    assert wanted.items() <= env.items()


# -- quoting alone -------------------------------------------------------------------------------------------------

# Proven on a real Cromwell 93 with sbatch, under dash and bash: text -> what stands in the command block.
CROMWELL_VECTORS = [
    ("", "''"),
    ("plain words", "'plain words'"),
    ('all of !"#%&()*+,./:;=?@[]^_{|} stays', "'all of !\"#%&()*+,./:;=?@[]^_{|} stays'"),
    ("it's", "\"$(printf 'it\\047s')\""),
    ("$(x) ~{x} >>>", "\"$(printf '\\044(x) \\176{x} \\076\\076\\076')\""),
    ("back\\slash", "\"$(printf 'back\\134slash')\""),
    ("100% <", "\"$(printf '100\\045 \\074')\""),
    ("-n\t", "\"$(printf '\\055n\\011')\""),
    ("-n", "'-n'"),
    ("SCRIPT_EPILOGUE", "\"$(printf 'SCRIPT\\137EPILOGUE')\""),
    ("a_DOCKER_b_c", "\"$(printf 'a_DOCKER\\137b_c')\""),
    ("é", "\"$(printf '\\303\\251')\""),
    ("two\nlines", "\"$(printf 'two\\012lines')\""),
    ("ends\n\n", '"$(printf \'ends\')""$nl""$nl"'),
    ("\n", '"$nl"'),
    ("cr\r\n", '"$(printf \'cr\\015\')""$nl"'),
]
WDL_VECTORS = [
    ("plain words-1.0,a=b@c:d/e+f_g", '"plain words-1.0,a=b@c:d/e+f_g"'),
    ("~{x}", '"\\u007e\\u007bx\\u007d"'),
    ('say "hi"\\', '"say \\u0022hi\\u0022\\u005c"'),
    ("é🧠", '"\\u00e9\\ud83e\\udde0"'),
    ("", '""'),
]


@pytest.mark.parametrize(("text", "written"), CROMWELL_VECTORS)
def test_command_words_are_those_that_were_proven(text: str, written: str) -> None:
    assert wdl.wdl_command(text) == written


@pytest.mark.parametrize(("text", "written"), WDL_VECTORS)
def test_wdl_strings_are_those_that_were_proven(text: str, written: str) -> None:
    assert wdl.wdl(text) == written


@pytest.mark.parametrize("text", ["a\nb", "a\rb"])
def test_wdl_strings_refuse_line_breaks(text: str) -> None:
    with pytest.raises(quote.Unwritable):
        wdl.wdl(text)


QUOTES = [
    quote.sh,
    wdl.wdl,
    wdl.wdl_command,
    quote.yaml,
    quote.json_,
    kubernetes.k8s,
    swarm.go_template,
]


@pytest.mark.parametrize("function", QUOTES)
@pytest.mark.parametrize("text", ["a\0b", "\ud800", "\0"])
def test_every_language_refuses_what_nothing_can_carry(function: Any, text: str) -> None:
    with pytest.raises(quote.Unwritable):
        function(text)


@pytest.mark.parametrize("function", QUOTES[:3])
@pytest.mark.parametrize("value", [None, b"bytes", ["list"], object()])
def test_shell_and_wdl_refuse_what_is_no_text(function: Any, value: object) -> None:
    with pytest.raises(TypeError, match="is not text"):
        function(value)


def test_numbers_and_booleans_stay_bare() -> None:
    for function in QUOTES[:5]:
        assert [function(v) for v in (7, -1, 1.5, True, False)] == ["7", "-1", "1.5", "true", "false"]
        with pytest.raises(ValueError):  # noqa: PT011 - json's own, or Unwritable
            function(float("nan"))


@given(TEXTS)
def test_quoted_words_are_one_line_and_printable(text: str) -> None:
    for written in (wdl.wdl_command(text), quote.yaml(text), quote.json_(text), kubernetes.k8s(text)):
        assert written.isascii()
        assert written.isprintable()


@given(IMAGES)
@example("localhost:5000/a")
def test_good_images_are_accepted(image: str) -> None:
    fields: dict[str, Any] = {
        "jid": "j", "args": [], "auid": "a", "number_of_workers": 1, "cpu_limit": 1, "memory_limit": 1, "gpu_limit": 0,
        "image": image, "entrypoint": ["a"], "type": "fs",
    }  # fmt: skip
    assert job.validate(fields).image == image


@given(st.sampled_from(["image", "jid", "partition"]), TEXTS)
def test_names_are_taken_whole_or_refused(field: str, text: str) -> None:
    fields: dict[str, Any] = {
        "jid": "j", "args": [], "auid": "a", "number_of_workers": 1, "cpu_limit": 1, "memory_limit": 1, "gpu_limit": 0,
        "image": "a", "entrypoint": ["a"], "type": "fs",
    } | {field: text}  # fmt: skip
    try:
        taken = getattr(job.validate(fields), field)
    except BadRequest as error:
        taken = error.message
    refused = isinstance(taken, dict) and set(taken) == {field}
    assert refused or taken == (text.lstrip("/") if field == "jid" else text)


def test_the_store_of_these_tests_is_hostile_too() -> None:
    assert Path(STORE).is_absolute()
    assert "$(" in STORE
    assert len(HOSTILE) > 80
