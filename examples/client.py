"""Runs three jobs, follows what they print, and says why each has ended: `python client.py http://127.0.0.1:5010`."""

import sys

import requests

URL = sys.argv[1] + "/api/v1/"
JOB = {"image": "docker.io/library/busybox", "args": [], "auid": "me", "type": "fs", "number_of_workers": 1}
JOB |= {"cpu_limit": 500, "memory_limit": 64, "gpu_limit": 0}
for jid, script in {"one": "echo good", "two": "echo bad; exit 3", "three": "kill -9 $$"}.items():
    requests.post(URL, json=JOB | {"jid": jid, "entrypoint": ["sh", "-c", script]}, timeout=100).raise_for_status()
for jid in ("one", "two", "three"):
    since = {}
    while since is not None:
        answer = requests.get(f"{URL}jobs/{jid}/logs", params={"follow": 1} | since, timeout=100)
        print(answer.text, end="")
        since = {"since": answer.headers["Pman-Logs-Next"]} if "Pman-Logs-Next" in answer.headers else None
    job = requests.get(f"{URL}jobs/{jid}/", timeout=100).json()
    print(jid, job["state"], job["reason"], job["exit_code"])
    requests.delete(f"{URL}{jid}/", timeout=100)
