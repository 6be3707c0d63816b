"""Every rule about a job request, and the Job that it becomes."""

from __future__ import annotations

import json
import logging
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pman import job, settings, storage
from pman.errors import BadRequest
from tests.generate import requests

GOOD: dict[str, Any] = {
    "jid": "chris-jid-1", "type": "ds", "auid": "cube", "image": "fnndsc/pl-simpledsapp", "entrypoint": ["app"],
    "args": [], "number_of_workers": 1, "cpu_limit": 1000, "memory_limit": 200, "gpu_limit": 0,
}  # fmt: skip


def make(request: dict[str, Any] | None = None, **environment: str) -> job.Job:
    return job.make_job(job.validate(GOOD | (request or {})), settings.load({"STOREBASE": "/store", **environment}))


def rejection(data: object) -> dict[str, str]:
    with pytest.raises(BadRequest) as caught:
        job.validate(data)
    assert caught.value.http_status == 400
    assert isinstance(caught.value.message, dict)
    return caught.value.message


# -- what is rejected ----------------------------------------------------------------------------------------------

_DIRECTORIES: list[Any] = [
    "", ".", "/", "/abs", "..", "a/../b", "../a", "a/..", "./", 7, [], "a\0", "\ud800", "x" * 256, "abcdefg/" * 500,
]  # fmt: skip
VALUES: dict[str, list[Any]] = {
    "jid": [
        "", "/", "a/b", "a?b", "a#b", "a%b", "a b", "a\n", "\u2003", "\x7f", "a" * 201, None, 7, [], ".", "..", "jobs",
        "openapi.json", "backend.json", "a\0b", "\ud800",
    ],
    "args": [None, "abc", {}, [1], [None], [["a"]], ["a\0b"], ["\udfff"], ["x" * 131_072]],
    "args_path_flags": [None, "abc", [1], ["\0"]],
    "auid": [None, 1, "\0", "\ud800"],
    "number_of_workers": [0, -1, 1025, None, {}, True, 1.5, "1.5", "x", "", " 1", 10**400, "9" * 400],
    "cpu_limit": [0, -1, "-1", None, {}, [], 1.0, False, 10**9, "1e3", "0x10", "\u0661"],
    "memory_limit": [0, -1, None, {}, 10**9, "9" * 13, float("inf")],
    "gpu_limit": [-1, 1025, None, "x", True],
    "image": [
        None, "", "A", "a b", "a:", "a@sha256:00", "-a", "a//b", "a\n", "http://a/b", "a" * 300, "$(x)", "a;b",
        "a:tag:tag", "é", "a/" + "b" * 700,
    ],
    "entrypoint": [None, [], [""], "app", ["-c"], ["A=b"], [1], ["a\0"]],
    "type": [None, "", "DS", "plugin", 1],
    "env": [
        None, "A=b", ["A"], ["=b"], ["1A=b"], ["A-B=c"], ["A B=c"], ["Ä=c"], [1], ["A=\0"], [{"A": 1}],
        ["A=" + "x" * 131_072],
    ],
    "input_dir": _DIRECTORIES,
    "output_dir": _DIRECTORIES,
    "time_limit_minutes": [0, -1, 525_601, "x", 1.5, True],
    "partition": ["", "-p", "a b", "a;b", "a\n", "x" * 201, 7],
}  # fmt: skip
BAD = [(field, value) for field, values in VALUES.items() for value in values]


@pytest.mark.parametrize(("field", "value"), BAD, ids=[f"{field}-{ascii(value)[:30]}" for field, value in BAD])
def test_a_bad_field_is_named_with_what_would_be_valid(field: str, value: object) -> None:
    message = rejection(GOOD | {field: value})
    assert set(message) == {field}
    assert "must be" in message[field]
    assert message[field].endswith(".")


def test_all_bad_fields_are_named_at_once() -> None:
    bad = {
        "jid": "a b", "type": "x", "auid": 1, "image": "A", "entrypoint": [], "args": "abc", "args_path_flags": [1],
        "number_of_workers": 0, "cpu_limit": 0, "memory_limit": 0, "gpu_limit": -1, "env": ["x"], "input_dir": "/",
        "output_dir": "..", "time_limit_minutes": 0, "partition": "a b", "append_directories": "no",
    }  # fmt: skip
    assert set(rejection(bad)) == set(job.JobRequest.model_fields)


def test_all_missing_fields_are_named_at_once() -> None:
    optional = {
        "args_path_flags",
        "env",
        "input_dir",
        "output_dir",
        "time_limit_minutes",
        "partition",
        "append_directories",
    }
    message = rejection({})
    assert set(message) == set(job.JobRequest.model_fields) - optional
    assert all(sentence.startswith("is required and must be ") for sentence in message.values())


def test_the_bad_item_is_numbered_and_never_repeated() -> None:
    message = rejection(GOOD | {"env": ["A=1", "my secret"]})
    assert message["env"].startswith("item 2 does not begin with NAME=")
    assert "secret" not in message["env"]


@pytest.mark.parametrize("body", [b"", b"{", b"nul", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 100_000, b"{]"])
def test_what_is_no_json_is_a_bad_request(body: bytes) -> None:
    with pytest.raises(BadRequest, match=r"^The body must be JSON"):
        job.parse_request(body)


@pytest.mark.parametrize("body", [b"null", b"[]", b'"text"', b"7", b"true"])
def test_what_is_no_object_is_a_bad_request(body: bytes) -> None:
    with pytest.raises(BadRequest, match="must be a JSON object"):
        job.parse_request(body)


# -- what is accepted ----------------------------------------------------------------------------------------------


@given(requests())
def test_good_requests_are_accepted_whole(request: dict[str, Any]) -> None:
    made = job.parse_request(json.dumps(request).encode())
    kept = made.model_dump(exclude={"args_path_flags"})
    for name, value in request.items():
        assert kept[name] == (value if not name.endswith("_dir") else kept[name])


def test_decimal_strings_are_integers() -> None:
    as_text = {"number_of_workers": "2", "cpu_limit": "1500", "memory_limit": "0512", "gpu_limit": "0"}
    made = job.validate(GOOD | as_text | {"time_limit_minutes": "10"})
    found = (made.number_of_workers, made.cpu_limit, made.memory_limit, made.gpu_limit, made.time_limit_minutes)
    assert found == (2, 1500, 512, 0, 10)


def test_unknown_fields_are_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        job.validate(GOOD | {"colour": "crimson", "new\nline": 1})
    assert "colour" in caplog.text
    assert "crimson" not in caplog.text
    assert "\\n" in caplog.messages[0]


def test_a_body_full_of_wrong_items_costs_little_memory() -> None:
    """An error for each of these items would take 400 MiB."""
    data = GOOD | {"args": [1] * 500_000, "env": [1] * 500_000}
    tracemalloc.start()
    try:
        assert set(rejection(data)) == {"args", "env"}
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def test_a_jid_whose_default_directory_has_too_long_a_name() -> None:
    """200 characters are 800 bytes here, of which a file system takes 255."""
    jid = "\U0001f9e0" * 200
    assert "too long" in rejection(GOOD | {"jid": jid})["jid"]
    assert job.validate(GOOD | {"jid": jid, "input_dir": "a", "output_dir": "b"}).jid == jid


def test_a_leading_slash_of_the_jid_is_stripped() -> None:
    assert job.validate(GOOD | {"jid": "/chris-jid-7"}).jid == "chris-jid-7"


@pytest.mark.parametrize(
    "image",
    [
        "a", "a:b", "a/b", "localhost/a", "localhost:5000/a/b:1", "docker.io/a/b_c__d-e.f:T.g-1",
        "a@sha256:" + "0" * 64, "a:1@sha256:" + "f" * 64, "[2001:db8::1]:5000/a", "xn--80ak.example/a", "a---b/c",
    ],
)  # fmt: skip
def test_oci_references_are_accepted(image: str) -> None:
    assert job.validate(GOOD | {"image": image}).image == image


@pytest.mark.parametrize("path", ["a", "a/b", "a//b", "a/./b", "a/b/", "it's $(x)", "a..b", "...", "~"])
def test_paths_below_the_store_are_accepted(path: str) -> None:
    made = make({"input_dir": path, "output_dir": "out"})
    assert made.input_dir == path.replace("//", "/").replace("/./", "/").rstrip("/")


# -- the job -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tail"),
    [("ds", ["/share/incoming", "/share/outgoing"]), ("fs", ["/share/outgoing"]), ("ts", ["/share/outgoing"])],
)
def test_the_directories_are_the_last_arguments(kind: str, tail: list[str]) -> None:
    made = make({"type": kind, "entrypoint": ["python", "app.py"], "args": ["-x", "1"]})
    assert list(made.argv) == ["python", "app.py", "-x", "1", *tail]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--in", "a", "b"], ["--in", "/share/incoming", "b"]),
        (["--in"], ["--in"]),
        (["--in", "--in", "x"], ["--in", "/share/incoming", "x"]),
        (["a", "--in=x"], ["a", "--in=x"]),
        (["--in", "a", "--other", "b"], ["--in", "/share/incoming", "--other", "/share/incoming"]),
    ],
)
def test_paths_after_flags_become_the_input_directory(args: list[str], expected: list[str]) -> None:
    made = make({"type": "fs", "args": args, "args_path_flags": ["--in", "--other"]})
    assert list(made.argv) == ["app", *expected, "/share/outgoing"]


def test_a_hundred_thousand_arguments_work() -> None:
    made = make({"args": ["--in", "x"] * 50_000, "args_path_flags": [f"--in{n}" for n in range(50_000)] + ["--in"]})
    assert len(made.argv) == 100_003
    assert made.argv.count("/share/incoming") == 50_001


def test_directories_default_to_what_older_pfcon_expects() -> None:
    made = make()
    assert (made.input_dir, made.output_dir) == ("key-chris-jid-1/incoming", "key-chris-jid-1/outgoing")


@pytest.mark.parametrize(
    ("requested", "environment", "expected"),
    [
        (None, {}, None),
        (None, {"TIMELIMIT_MINUTES": "30"}, 30),
        (90, {"TIMELIMIT_MINUTES": "30"}, 90),
        (90, {"TIMELIMIT_MAX_MINUTES": "60"}, 60),
        (None, {"TIMELIMIT_MAX_MINUTES": "60"}, 60),
        (20, {"TIMELIMIT_MINUTES": "30", "TIMELIMIT_MAX_MINUTES": "60"}, 20),
        (None, {"TIMELIMIT_MINUTES": "90", "TIMELIMIT_MAX_MINUTES": "60"}, 60),
    ],
)
def test_time_limit(requested: int | None, environment: dict[str, str], expected: int | None) -> None:
    assert make({"time_limit_minutes": requested} if requested else {}, **environment).time_limit_minutes == expected


def test_partition_of_the_request_wins() -> None:
    assert make().partition is None
    assert make(SLURM_PARTITION="short").partition == "short"
    assert make({"partition": "gpu"}, SLURM_PARTITION="short").partition == "gpu"


def test_environment_keeps_its_order_and_the_last_of_a_name() -> None:
    made = make({"env": ["B=1", "A==x=", "B=2", "EMPTY="]})
    assert made.env == (("B", "2"), ("A", "=x="), ("EMPTY", ""))


def test_home_workaround_never_overrides_a_request() -> None:
    assert make(ENABLE_HOME_WORKAROUND="yes").env == (("HOME", "/tmp"),)
    assert make({"env": ["HOME=/h"]}, ENABLE_HOME_WORKAROUND="yes").env == (("HOME", "/h"),)


def test_a_user_range_draws_the_same_number_for_a_job() -> None:
    drawn = {make({"jid": f"j{n}"}, CONTAINER_USER="1000-1009:5").uid for n in range(200)}
    assert drawn == set(range(1000, 1010))
    assert [(j.uid, j.gid) for j in (make(CONTAINER_USER=user) for user in ("1001:", ":7", ":", ""))] == [
        (1001, None), (None, 7), (None, None), (None, None),
    ]  # fmt: skip
    one = make(CONTAINER_USER="1000-1009:5")
    assert (one.uid, one.gid) == (make(CONTAINER_USER="1000-1009:5").uid, 5)
    assert (make().uid, make().gid) == (None, None)


def test_whole_cores_are_rounded_up() -> None:
    assert [make({"cpu_limit": n}).cpu_cores for n in (1, 1000, 1001, 2500)] == [1, 1, 2, 3]


def test_the_command_line_is_quoted_into_one_string() -> None:
    assert make({"type": "fs", "args": ["it's", ""]}).cmd == "app 'it'\"'\"'s' '' /share/outgoing"


@given(st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="/?#%"), min_size=1, max_size=200))
def test_backend_names_are_labels_of_fifty(jid: str) -> None:
    name = job.backend_name(jid)
    assert job._DNS_LABEL.fullmatch(name)
    assert len(name) <= 50
    assert job.backend_name(jid) == name


def test_backend_names_are_unique() -> None:
    rng = random.Random(7)
    jids = {"".join(rng.choice("aA-_.0é") for _ in range(rng.randint(1, 4))) for _ in range(3000)}
    jids |= {f"{'x' * n}" for n in range(1, 200)} | {job.backend_name(jid) for jid in jids}
    assert len({job.backend_name(jid) for jid in jids}) == len(jids)
    assert job.backend_name("chris-jid-7") == "chris-jid-7"


def test_equal_requests_have_equal_digests_and_others_do_not() -> None:
    same = [
        make(),
        make(dict(reversed(GOOD.items()))),
        make({"cpu_limit": "1000"}),
        make({"extra": 1}),
        make({"jid": "/chris-jid-1"}),
    ]
    same.append(make({"input_dir": "key-chris-jid-1/incoming", "output_dir": "key-chris-jid-1/./outgoing"}))
    assert len({made.digest for made in same}) == 1
    others: list[dict[str, Any]] = [
        {"args": ["x"]},
        {"auid": "b"},
        {"env": ["A=1"]},
        {"gpu_limit": 1},
        {"time_limit_minutes": 5},
    ]
    others += [{"partition": "p"}, {"input_dir": "x"}, {"type": "fs"}, {"args": [""]}, {"args_path_flags": ["x"]}]
    assert len({make(other).digest for other in others} | {same[0].digest}) == len(others) + 1


# -- the store -----------------------------------------------------------------------------------------------------


def prepared(store: Path, **fields: Any) -> job.Job:
    config = settings.load({"STOREBASE": str(store)})
    made = job.make_job(job.validate(GOOD | fields), config)
    storage.prepare(made, config)
    return made


def test_links_that_leave_the_store_are_refused_both_at_once(tmp_path: Path) -> None:
    store, outside = tmp_path / "store", tmp_path / "outside"
    store.mkdir()
    outside.mkdir()
    (store / "link").symlink_to(outside)
    with pytest.raises(BadRequest) as caught:
        prepared(store, input_dir="link", output_dir="link/x")
    assert isinstance(caught.value.message, dict)
    assert set(caught.value.message) == {"input_dir", "output_dir"}
    assert list(outside.iterdir()) == []


def test_links_within_the_store_are_fine(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    prepared(tmp_path, input_dir="link/in", output_dir="link/out")
    assert (tmp_path / "real" / "out").is_dir()


def test_the_output_directory_is_made_and_an_input_only_for_fs(tmp_path: Path) -> None:
    prepared(tmp_path, input_dir="a/in", output_dir="a/out")
    assert not (tmp_path / "a/in").exists()
    assert (tmp_path / "a/out").is_dir()
    prepared(tmp_path, type="fs", input_dir="b/in", output_dir="b/out")
    assert (tmp_path / "b/in").is_dir()


def test_a_missing_directory_that_an_fs_job_reads_is_refused(tmp_path: Path) -> None:
    """As pl-dircopy, whose argument `--dir` is a path: made anew, it would be an empty copy and a success."""
    reading = {"type": "fs", "args": ["--dir", "x"], "args_path_flags": ["--dir"]}
    with pytest.raises(BadRequest, match="does not exist in the store"):
        prepared(tmp_path, **reading, input_dir="SERVICES/PACS/tpyo", output_dir="out")
    assert not (tmp_path / "SERVICES").exists()
    prepared(tmp_path, **reading)
    assert (tmp_path / f"key-{GOOD['jid']}" / "incoming").is_dir()


def test_a_file_where_the_directory_should_be_is_a_bad_request(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(BadRequest, match="is a file in the store"):
        prepared(tmp_path, output_dir="out")


def test_a_store_that_pman_does_not_see_is_left_alone(tmp_path: Path) -> None:
    prepared(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_the_shared_directory_is_named_only_where_there_is_one() -> None:
    config = settings.load({"STOREBASE": "/store"})
    assert storage.mounts(make(), config).shared == "/store/key-chris-jid-1"
    assert storage.mounts(make({"output_dir": "elsewhere/outgoing"}), config).shared is None
    assert storage.mounts(make({"input_dir": "k/in", "output_dir": "k/out"}), config).shared is None


def test_volumes_have_relative_sources() -> None:
    config = settings.load({"STORAGE_TYPE": "kubernetes_pvc", "VOLUME_NAME": "v", "STOREBASE": "/store"})
    found = storage.mounts(make(), config)
    assert (found.incoming.source, found.volume) == ("key-chris-jid-1/incoming", "v")
