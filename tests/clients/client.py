"""The Python client that openapi-generator makes: `python client.py URL REQUEST_FILE`."""

import json
import sys
import time
from pathlib import Path

import pman_client  # type: ignore[import-not-found] # made by the test
from pman_client.exceptions import BadRequestException, NotFoundException  # type: ignore[import-not-found]

url, request_file = sys.argv[1:]
with pman_client.ApiClient(pman_client.Configuration(host=url)) as client:
    api = pman_client.DefaultApi(client)
    body = json.loads(Path(request_file).read_text()) | {"jid": "python"}
    job = api.submit(pman_client.JobRequest.from_dict(body))
    while job.status in ("notstarted", "started"):
        time.sleep(0.2)
        job = api.read("python", tail=10)
    assert (job.status, job.logs) == ("finishedSuccessfully", "hello\n"), job
    wrong = pman_client.JobRequest.model_construct(**body | {"args_path_flags": [], "cpu_limit": -1})
    try:
        api.submit(wrong)
        sys.exit("a wrong field was accepted")
    except BadRequestException as error:
        print("cpu_limit" in error.body)
    api.delete("python")
    try:
        api.read("python")
        sys.exit("the job is still there")
    except NotFoundException:
        print("gone")
