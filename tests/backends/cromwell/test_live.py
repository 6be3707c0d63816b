"""What `pman check --live` hears of Cromwell: of the stand-in, whose README says how its `describe` differs."""

from __future__ import annotations

from pathlib import Path

from pman import backends, settings
from pman.job import make_job, validate
from pman.targets import TARGETS
from pman.templating.render import SAMPLE, Renderer, Spec
from tests.fakes.test_fake_cromwell import serving


def test_cromwell_is_asked_about_the_workflow_and_the_backend(tmp_path: Path) -> None:
    with serving(tmp_path) as stand_in:
        asked = {"CONTAINER_ENV": "cromwell", "CROMWELL_URL": stand_in.url, "STOREBASE": "/data"}
        config = settings.load(asked)
        text = Renderer(config, TARGETS).render(make_job(validate(dict(SAMPLE)), config), "wdl").text
        unasked = "Cromwell was not asked about what its configuration makes of runtime attributes"
        (note,) = backends.live(config, Spec("wdl", text))
        assert (note.rule, note.message.partition(" (")[0]) == ("not-asked", unasked)
        broken = text.replace("call plugin_instance", "call another")
        config = settings.load({**asked, "CROMWELL_BACKEND": "PBS"})
        workflow, backend, note = backends.live(config, Spec("wdl", broken))
        assert (workflow.rule, workflow.message.partition(":")[0]) == ("live", "Cromwell does not take this")
        assert backend.message.startswith("Cromwell has no backend PBS; CROMWELL_BACKEND may be ")
        assert (
            stand_in.session.get(f"{stand_in.url}/api/workflows/v1/query", timeout=10).json()["totalResultsCount"] == 0
        )
