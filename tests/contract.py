"""The contract of pfcon and the promises of pman, over HTTP, for every backend alike.

A backend's test module subclasses Contract and provides a class-scoped fixture `rig`. The jobs are small shell
scripts; how often one ran is what it wrote into its output directory.
"""

from __future__ import annotations

import shlex
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import jsonschema
import pytest

from tests.rig import COUNTED, OUT, ROOT, Rig, Server, wait_for

# What the resource of a job that has run tells, where the backend knows it.
KNOWN = ("posted_at", "started_at", "finished_at", "user", "kind", "argv", "partition", "nodes", "backend_id")
LINES = ["line 1", "line 2", "line 3"]
FIELDS = {"jid", "image", "cmd", "status", "message", "timestamp", "logs"}
HOSTILE = [
    "it's", 'a "quote"', "$(touch never)", "`touch never`", "~{wdl} >>> ${x}", "{{.Node.ID}}", "$(HOME) $$(HOME) $$$",
    "back\\slash\\n", "", "two\nlines\n\n", "\ttab", "na\u00efve \U0001f9e0", "SCRIPT_EPILOGUE",
    "-n", "%s%%", "#SBATCH --x", " ", "*", "a\r\nb", "x\n#PBS -q no-such\n#BSUB -q no-such\n",
]  # fmt: skip


def unknown_to(backend: str) -> set[str]:
    """What the table of docs/usage.md says that a backend does not know of every job."""
    table = (ROOT / "docs" / "usage.md").read_text().partition("\n| known | ")[2].partition("\n\n")[0]
    heading, _, *rows = [
        [cell.strip() for cell in row.strip("| ").split("|")] for row in f"known | {table}".split("\n")
    ]
    column = next(number for number, names in enumerate(heading) if f"`{backend}`" in names)
    names = {name.strip("` ") for row in rows if row[column] != "yes" for name in row[0].split(",")}
    return names & {*KNOWN, "cpu_millicores", "memory_mib", "gpu_count"}


class Contract:
    """Every test of this class holds for every backend."""

    last_words = "printf end"

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, rig: Rig) -> Server:
        return rig.start()

    @pytest.fixture
    def jid(self, server: Server) -> Iterator[str]:
        name = f"chris-jid-{uuid.uuid4().hex[:8]}"
        yield name
        server.delete(name)

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def limited(cls, rig: Rig, server: Server) -> str:
        """A job that runs into its time limit of one minute while the other tests go on.

        It takes the signal for a wish to end well: with half of its output, that is no success.
        """
        name = f"limited-{uuid.uuid4().hex[:8]}"
        script = COUNTED + "trap 'exit 0' TERM; echo before; for i in $(seq 3000); do sleep 0.2; done; echo after"
        assert server.post(rig.request(name, script, time_limit_minutes=1)).status_code == 201
        return name

    def test_about(self, server: Server, rig: Rig) -> None:
        answer = server.call("GET")
        assert answer.status_code == 200
        assert set(answer.json()) == {"server_version", "container_env", "storage_type"}
        assert answer.json()["container_env"] == rig.env.get("CONTAINER_ENV", "local")

    def test_good_job(self, server: Server, rig: Rig, jid: str) -> None:
        script = COUNTED + 'cat "$1/in.txt" > "$2/out.txt"; echo to stdout; echo to stderr >&2'
        request = rig.request(jid, script, type="ds")
        (rig.store / request["input_dir"] / "in.txt").write_text("pixels\n")
        answer = server.post(request)
        assert answer.status_code == 201, answer.text
        posted = answer.json()
        assert set(posted) == FIELDS
        assert all(isinstance(value, str) for value in posted.values())
        assert posted["logs"] == ""
        assert posted["jid"] == jid
        assert posted["image"] == rig.image
        assert posted["cmd"].endswith("/share/incoming /share/outgoing")
        job = server.wait_final(jid, rig.job_seconds)
        assert (job["status"], job["message"]) == ("finishedSuccessfully", ""), job
        assert job["cmd"] == posted["cmd"]
        assert job["image"] == rig.image
        assert "to stdout\n" in job["logs"]
        assert "to stderr\n" in job["logs"]
        assert datetime.fromisoformat(job["timestamp"]).tzinfo is not None
        assert (rig.outgoing(jid) / "out.txt").read_text() == "pixels\n"
        assert rig.executions(jid) == 1

        self.known(server, rig, jid, exit_code=0, argv=[*request["entrypoint"], "/share/incoming", "/share/outgoing"])

    def known(self, server: Server, rig: Rig, jid: str, reason: str | None = None, **wanted: object) -> dict[str, Any]:
        """The job's resource: as its schema says, in keeping with the contract, with the values that are wanted."""
        answer = server.call("GET", f"jobs/{jid}/")
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        schemas = server.call("GET", "openapi.json").json()["components"]["schemas"]
        jsonschema.validate(job, schemas["JobResource"])
        basic = server.get(jid, tail=0).json()
        same = {"state": "status", "message": "message", "image": "image", "jid": "jid"}
        assert {name: job[name] for name in same} == {name: basic[other] for name, other in same.items()}
        assert shlex.join(job["argv"]) == basic["cmd"]
        assert {name: job[name] for name in wanted} == wanted
        assert job["reason"] == reason, job
        unknown = {name for name in KNOWN if job[name] is None} | {
            name for name in ("cpu_millicores", "memory_mib", "gpu_count") if job["resources"][name] is None
        }
        assert unknown == (unknown_to(rig.env.get("CONTAINER_ENV", "local")) if rig.unknown is None else rig.unknown)
        return job

    def test_the_backend_tells_what_it_has(self, server: Server, rig: Rig) -> None:
        answer = server.call("GET", "backend.json")
        assert answer.status_code == 200, answer.text
        found = answer.json()
        schemas = server.call("GET", "openapi.json").json()["components"]["schemas"]
        jsonschema.validate(found, schemas["Backend"])
        assert (found["ready"], found["backend"]) == (True, rig.env.get("CONTAINER_ENV", "local")), found
        assert found["places"] or found["unknown"]
        assert all(place["name"] for place in found["places"])

    def test_exit_code(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, "echo oops >&2; exit 3"))
        job = server.wait_final(jid, rig.job_seconds)
        assert job["status"] == "finishedWithError"
        assert "exit code 3" in job["message"]
        assert "oops" in job["logs"]
        found = self.known(server, rig, jid, "exit", exit_code=3, user="tester")
        times = [found[name][:19] for name in KNOWN[:3] if found[name]]  # SLURM tells whole seconds
        assert times == sorted(times)
        assert [(w["index"], w["state"], w["reason"], w["exit_code"]) for w in found["workers"]] == [
            (0, "finishedWithError", "exit", 3)
        ]

    def test_missing_program(self, server: Server, rig: Rig, jid: str) -> None:
        answer = server.post(rig.request(jid, "", entrypoint=["/no/such/program"]))
        if answer.status_code == 400:  # an engine that starts jobs at once, and keeps nothing of one that it cannot
            assert "/no/such/program" in answer.json()["message"]
            assert server.get(jid).status_code == 404
            return
        job = server.wait_final(jid, rig.job_seconds)
        assert job["status"] == "finishedWithError"
        assert job["message"]

    def test_same_request_again(self, server: Server, rig: Rig, jid: str) -> None:
        request = rig.request(jid, COUNTED)
        assert [server.post(request).status_code for _ in range(3)] == [201, 201, 201]
        server.wait_final(jid, rig.job_seconds)
        again = server.post(request)
        assert again.status_code == 201
        assert again.json()["status"] == "finishedSuccessfully"
        assert rig.executions(jid) == 1

    def test_other_request_same_jid(self, server: Server, rig: Rig, jid: str) -> None:
        assert server.post(rig.request(jid, COUNTED)).status_code == 201
        other = server.post(rig.request(jid, COUNTED + "true"))
        assert other.status_code == 409
        assert jid in other.json()["message"]
        server.wait_final(jid, rig.job_seconds)
        assert rig.executions(jid) == 1

    @pytest.mark.slow
    def test_concurrent_posts_to_two_processes(self, server: Server, rig: Rig, jid: str) -> None:
        second = rig.start()
        request = rig.request(jid, COUNTED + "sleep 1")
        barrier = threading.Barrier(16)

        def post(number: int) -> int:
            barrier.wait()
            return (server, second)[number % 2].post(request).status_code

        with ThreadPoolExecutor(16) as pool:
            codes = list(pool.map(post, range(16)))
        assert codes == [201] * 16
        server.wait_final(jid, rig.job_seconds)
        assert second.get(jid).json()["status"] == "finishedSuccessfully"
        assert rig.executions(jid) == 1
        second.stop()

    def test_delete_then_post_again(self, server: Server, rig: Rig, jid: str) -> None:
        request = rig.request(jid, COUNTED)
        server.post(request)
        server.wait_final(jid, rig.job_seconds)
        assert (server.delete(jid).status_code, server.get(jid).status_code) == (204, 404)
        assert server.post(request).status_code == 201
        assert server.wait_final(jid, rig.job_seconds)["status"] == "finishedSuccessfully"
        assert rig.executions(jid) == 2

    def test_delete_twice(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, "true"))
        first = server.delete(jid)
        assert (first.status_code, first.content) == (204, b"")
        assert server.get(jid).status_code == 404
        assert server.delete(jid).status_code in (204, 404)  # 204 where the backend shows that there was a job
        assert server.get(jid).json()["message"]

    @pytest.mark.slow
    def test_two_deletes_at_once(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, "sleep 600"))
        server.wait_state(jid, "started", rig.job_seconds)
        with ThreadPoolExecutor(2) as pool:
            codes = sorted(pool.map(lambda _: server.delete(jid).status_code, range(2)))
        assert codes in ([204, 204], [204, 404])
        assert server.get(jid).status_code == 404

    @pytest.mark.slow
    def test_delete_ends_a_running_job(self, server: Server, rig: Rig, jid: str) -> None:
        request = rig.request(jid, OUT + 'while :; do echo beat >> "$out/beats"; sleep 0.1; done')
        server.post(request)
        beats = rig.outgoing(jid) / "beats"
        wait_for(beats.exists, rig.job_seconds, "the first beat")
        assert server.delete(jid).status_code == 204
        sizes: list[int] = []

        def silent() -> bool:
            sizes.append(beats.stat().st_size)
            return len(sizes) > 5 and len(set(sizes[-5:])) == 1

        wait_for(silent, rig.job_seconds, "the job to stop writing", every=0.2)
        assert server.post(request).status_code == 201
        assert server.delete(jid).status_code == 204

    @pytest.mark.slow
    def test_files_are_complete_when_finished(self, server: Server, rig: Rig, jid: str) -> None:
        script = OUT + 'i=0; while [ $i -lt 20 ]; do echo line >> "$out/lines"; i=$((i+1)); sleep 0.05; done'
        server.post(rig.request(jid, script))
        server.wait_final(jid, rig.job_seconds)
        assert len((rig.outgoing(jid) / "lines").read_text().splitlines()) == 20

    @pytest.mark.parametrize("wrong", ["chris-jid", "chris-jid-00000000", "CHRIS", "%20", "a" * 300])
    def test_unknown_jid(self, server: Server, wrong: str) -> None:
        assert server.get(wrong).status_code == 404
        assert server.delete(wrong).status_code == 404

    def test_prefix_of_a_jid_is_unknown(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, "true"))
        assert server.get(jid[:-1]).status_code == 404
        assert server.get(jid.upper()).status_code == 404
        assert server.delete(jid[:-1]).status_code == 404

    def test_odd_jids(self, server: Server, rig: Rig) -> None:
        names = ("Ch\u00c4_RIS.jid:1~x", "x" * 180, "A_b", "two..dots", "'$(x)'")
        odd = ["-", *(f"{name}{uuid.uuid4().hex[:6]}" for name in names)]
        for jid in odd:
            assert server.post(rig.request(jid, "true")).json()["jid"] == jid
        for jid in odd:
            job = server.wait_final(jid, rig.job_seconds)
            assert (job["jid"], job["status"]) == (jid, "finishedSuccessfully")
            assert server.delete(jid).status_code == 204
            assert server.get(jid).status_code == 404

    def test_hostile_arguments_and_environment(self, server: Server, rig: Rig, jid: str) -> None:
        env = [f"V{i}={value}" for i, value in enumerate(HOSTILE)]
        script = (
            OUT
            + r"""printf '%s\0' "$@" > "$out/argv"
            for i in $(seq 0 19); do eval "printf '%s\0' \"\$V$i\""; done > "$out/env" """
        )
        assert server.post(rig.request(jid, script, *HOSTILE, env=env)).status_code == 201
        job = server.wait_final(jid, rig.job_seconds)
        assert job["status"] == "finishedSuccessfully", job
        argv = (rig.outgoing(jid) / "argv").read_bytes().split(b"\0")
        assert argv[: len(HOSTILE)] == [value.encode() for value in HOSTILE]
        assert (rig.outgoing(jid) / "env").read_bytes().split(b"\0")[:-1] == [value.encode() for value in HOSTILE]

    def test_input_is_read_only(self, server: Server, rig: Rig, jid: str) -> None:
        if not rig.read_only_input:
            return  # stated in the rig: this runtime has no read-only binds
        request = rig.request(jid, 'touch "$1/x" && echo written; true', type="ds")
        server.post(request)
        job = server.wait_final(jid, rig.job_seconds)
        assert "written" not in job["logs"]
        assert not (rig.store / request["input_dir"] / "x").exists()

    def test_missing_input_fails_readably(self, server: Server, rig: Rig, jid: str) -> None:
        request = rig.request(jid, COUNTED, type="ds", input_dir=f"no-such-directory-{jid}")
        answer = server.post(request)
        assert answer.status_code in (201, 400), answer.text
        if answer.status_code == 400:
            assert answer.json()["message"]
            return
        job = server.wait_final(jid, rig.job_seconds)
        assert job["status"] == "finishedWithError"
        assert "no-such-directory" in job["message"] + job["logs"], job
        assert not (rig.store / request["input_dir"]).exists()

    def test_missing_output_directory_is_made(self, server: Server, rig: Rig, jid: str) -> None:
        request = rig.request(jid, 'echo x > "$1/made"', output_dir=f"feeds/{jid}/new")
        server.post(request)
        assert server.wait_final(jid, rig.job_seconds)["status"] == "finishedSuccessfully"
        assert (rig.store / request["output_dir"] / "made").read_text() == "x\n"

    def test_four_workers(self, server: Server, rig: Rig, jid: str) -> None:
        if not rig.workers:
            assert server.post(rig.request(jid, "true", number_of_workers=4)).status_code == 400
            return
        script = 'echo "$PMAN_WORKER_COUNT" > "$1/worker-$PMAN_WORKER_INDEX"; echo "I am $PMAN_WORKER_INDEX"'
        server.post(rig.request(jid, script, number_of_workers=4))
        job = server.wait_final(jid, rig.job_seconds)
        assert job["status"] == "finishedSuccessfully", job
        assert sorted(path.name for path in rig.outgoing(jid).iterdir()) == [f"worker-{i}" for i in range(4)]
        assert (rig.outgoing(jid) / "worker-0").read_text() == "4\n"
        answers = [server.call("GET", f"jobs/{jid}/logs", params={"worker": worker}) for worker in (3, 4)]
        assert [answer.status_code for answer in answers] == [200, 404]
        assert f"The job {jid} has no worker 4" in answers[1].json()["message"]
        assert all(f"I am {i}\n" in job["logs"] for i in range(4))

    def test_one_bad_worker_fails_the_job(self, server: Server, rig: Rig, jid: str) -> None:
        if rig.workers:
            server.post(rig.request(jid, 'exit "$PMAN_WORKER_INDEX"', number_of_workers=2))
            assert server.wait_final(jid, rig.job_seconds)["status"] == "finishedWithError"

    def test_tail(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, "seq 1 3000"))
        assert server.wait_final(jid, rig.job_seconds)["logs"].split() == [str(n) for n in range(2001, 3001)]
        assert server.get(jid, tail=2).json()["logs"].split() == ["2999", "3000"]
        assert server.get(jid, tail=0).json()["logs"] == ""
        assert server.get(jid, tail="x").status_code == 400

    @pytest.mark.slow
    def test_pman_is_killed_while_a_job_runs(self, rig: Rig, server: Server, jid: str) -> None:
        first = rig.start()
        first.post(rig.request(jid, COUNTED + "sleep 2; echo survived"))
        first.kill()
        job = server.wait_final(jid, rig.job_seconds)
        assert job["status"] == "finishedSuccessfully"
        assert "survived" in job["logs"]
        assert rig.executions(jid) == 1

    def test_listing(self, server: Server, rig: Rig, jid: str) -> None:
        jids = [f"{jid}-{number}" for number in range(3)]
        for name in jids:
            assert server.post(rig.request(name, "true")).status_code == 201
            server.wait_final(name, rig.job_seconds)
        page = server.call("GET", "jobs/").json()
        assert [job["jid"] for job in page["jobs"] if job["jid"] in jids] == jids[::-1]
        assert all(set(job) == FIELDS | {"posted_at", "user"} for job in page["jobs"])
        params = {"text": jid.upper(), "user": "tester", "image": rig.image}

        def all_ended() -> dict[str, Any] | None:  # Cromwell's listing is a moment older than what it says of one job
            found: dict[str, Any] = server.call("GET", "jobs/", params=params).json()
            return found if found["counts"]["finishedSuccessfully"] == 3 else None

        found = wait_for(all_ended, 10, "the end of three jobs in the listing")
        assert [job["jid"] for job in found["jobs"]] == jids[::-1]
        assert sum(found["counts"].values()) == 3
        for params in ({"user": "nobody"}, {"text": "no such text"}, {"posted_since": "2999-01-01T00:00:00Z"}):
            found = server.call("GET", "jobs/", params=params).json()
            assert (found["jobs"], sum(found["counts"].values())) == ([], 0), params
        running = server.call("GET", "jobs/", params={"state": "notstarted"}).json()["jobs"]
        assert not {job["jid"] for job in running} & set(jids)
        seen: list[str] = []
        after = ""
        while True:
            page = server.call("GET", "jobs/", params={"limit": 2, "after": after}).json()
            seen += [job["jid"] for job in page["jobs"]]
            if not (after := page["next"]):
                break
        assert len(seen) == len(set(seen))
        assert set(jids) <= set(seen)
        for name in jids:
            server.delete(name)

    def test_spec_hides_the_environment(self, server: Server, rig: Rig, jid: str) -> None:
        request = rig.request(jid, "true", env=["TOKEN=it's hunter2", "OTHER=hunter2"])
        assert server.post(request).status_code == 201
        answer = server.call("GET", f"jobs/{jid}/spec")
        assert answer.status_code == 200, answer.text
        assert answer.json()["environment"] is False
        assert "TOKEN" in answer.json()["parts"]["spec"]
        assert "hunter2" not in answer.text
        assert server.call("GET", f"jobs/{jid}/spec", params={"environment": 1}).status_code == 403
        server.wait_final(jid, rig.job_seconds)

    def test_logs_are_followed(self, server: Server, rig: Rig, jid: str) -> None:
        """Each line comes once and in order. Each answer begins where the one before it has ended."""
        script = OUT + 'for i in 1 2 3; do echo "line $i"; echo >> "$out/n"; sleep 1; done; echo bad >&2; sleep 1; '
        assert server.post(rig.request(jid, script + self.last_words)).status_code == 201
        texts, since = list[str](), ""
        while not texts or since:
            answer = server.call("GET", f"jobs/{jid}/logs", params={"follow": 1, "since": since})
            assert answer.status_code == 200, answer.text
            assert "Pman-Logs-Cut" not in answer.headers
            texts.append(answer.text)
            since = answer.headers.get("Pman-Logs-Next", "")
        assert sorted("".join(texts).splitlines()) == ["bad", "end", *LINES], texts
        assert len([text for text in texts if text]) > 1
        assert server.get(jid).json()["status"] == "finishedSuccessfully"
        assert server.call("GET", f"jobs/{jid}/logs", params={"since": "x"}).status_code == 400

    def test_remove_jobs_no(self, rig: Rig, server: Server, jid: str) -> None:
        keeping = rig.start(REMOVE_JOBS="no")
        keeping.post(rig.request(jid, "true"))
        assert keeping.delete(jid).status_code == 204
        assert keeping.get(jid).status_code == 200
        assert keeping.delete("unknown-jid").status_code == 404
        keeping.stop()

    def test_probes(self, server: Server) -> None:
        assert server.call("GET", "../../healthz").status_code == 200
        assert server.call("GET", "../../readyz").status_code == 200

    @pytest.mark.slow
    def test_time_limit(self, rig: Rig, server: Server, limited: str) -> None:
        """This test is the last one, since its job was posted before all others."""
        job = server.wait_final(limited, 60 + rig.job_seconds + 60)
        assert job["status"] == "finishedWithError"
        assert "time limit" in job["message"], job
        self.known(server, rig, limited, "time_limit", time_limit_minutes=1)
        assert "before" in job["logs"]
        assert "after" not in job["logs"]
        assert rig.executions(limited) == 1
        assert server.delete(limited).status_code == 204
