"""What `pman serve` says of a site's templates when it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pman import settings
from pman.errors import TemplateError
from pman.service import app
from tests.backends.test_local import local_rig
from tests.checking.overlays import LOCAL, only, write
from tests.rig import running


def test_what_is_wrong_in_an_overlay_is_logged(tmp_path: Path) -> None:
    place = write(tmp_path / "site", only(LOCAL, "prologe", "x\n"))
    with running(local_rig(tmp_path)) as rig:
        log = rig.start(TEMPLATES_DIR=str(place)).log.read_text()
    assert f"{place}/{LOCAL}:2:10: error: the block prologe overrides nothing" in log


def test_what_cannot_render_stops_the_start(tmp_path: Path) -> None:
    base = {"APPLICATION_MODE": "dev", "STOREBASE": str(tmp_path), "LOCAL_STATE_DIR": str(tmp_path / "state")}
    place = write(tmp_path / "site", only(LOCAL, "prologue", "{{ jobs }}\n"))
    with pytest.raises(TemplateError, match=r"local/job\.sh\.j2:3: 'jobs' is undefined"):
        app.create_app(settings.load({**base, "TEMPLATES_DIR": str(place)}))


def test_the_service_starts_where_the_template_refuses_its_sample(tmp_path: Path) -> None:
    place = write(tmp_path / "site", only(LOCAL, "prologue", "{{ refuse('only images of this site') }}\n"))
    given = {"APPLICATION_MODE": "dev", "STOREBASE": str(tmp_path), "LOCAL_STATE_DIR": str(tmp_path / "state")}
    app.create_app(settings.load({**given, "TEMPLATES_DIR": str(place)}))
