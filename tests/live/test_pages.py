"""The pages in a real headless Chromium, over a real pman; screenshots are kept as artefacts of the test run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import bcrypt
import pytest
import requests
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from tests.backends.test_local import local_rig
from tests.browser import chromium, resize
from tests.rig import ROOT, Rig, Server, running, wait_for

pytestmark = pytest.mark.live("chromium")
WIDTHS = (1280, 400)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(local_rig(tmp_path_factory.mktemp("pages"))) as rig:
        yield rig


@pytest.fixture(scope="module")
def server(rig: Rig) -> Iterator[Server]:
    server = rig.start()
    server.post(rig.request("brain-7", 'echo "<b>not bold</b>"; echo fine'))
    server.post(rig.request("brain-8", "exit 3"))
    for jid in ("brain-7", "brain-8"):
        server.wait_final(jid)
    server.post(rig.request("brain-9", "sleep 300"))
    yield server
    server.delete("brain-9")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        assert os.environ.get("CI") != "true", "Debian's packages chromium and chromium-driver are missing"
        pytest.skip("chromium: Debian's packages chromium and chromium-driver are missing")
    with chromium(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome


def fits(browser: webdriver.Chrome, width: int, picture: Path) -> None:
    """At this width nothing sticks out sideways. Keeps a screenshot."""
    resize(browser, width, 900)
    wide: int = browser.execute_script("return document.documentElement.scrollWidth")
    browser.save_screenshot(str(picture))
    assert wide <= width, f"the page is {wide} px wide on a screen of {width}"


def no_errors(browser: webdriver.Chrome) -> None:
    entries = browser.get_log("browser")  # type: ignore[no-untyped-call]
    assert entries == []


def no_barriers(browser: webdriver.Chrome) -> None:
    """axe-core finds nothing that keeps people from using this page, in light and in dark."""
    place = importlib.util.find_spec("axe_core_python")
    if not (place and place.submodule_search_locations):
        assert os.environ.get("CI") != "true", "axe-core-python of the extra `test` is missing"
        pytest.skip("axe-core: the package axe-core-python of the extra `test` is missing")
    browser.execute_script((Path(place.submodule_search_locations[0]) / "axe.min.js").read_text())
    for scheme in ("light", "dark"):
        emulated = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)
        found: list[str] = browser.execute_script(
            "return axe.run().then(r => r.violations.map(v => v.id + ': ' + v.nodes.map(n => n.html).join(' ')))"
        )
        assert found == [], scheme
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def rows(browser: webdriver.Chrome) -> dict[str, str]:
    """jid -> row, read at once: the page takes over what is new every few seconds."""
    texts: list[str] = browser.execute_script(
        "return [document.getElementById('health'), ...document.querySelectorAll('tbody tr')].map(e => e.innerText)"
    )
    assert "can take jobs" in texts[0]
    return {text.split()[0]: text for text in texts[1:]}


def test_dark_pages_for_users(browser: webdriver.Chrome, server: Server, rig: Rig, tmp_path: Path) -> None:
    """Text is light on dark where the system is dark; a browser asks for the password that AUTH_USERS_FILE wants."""
    users = tmp_path / "users"
    users.write_bytes(b"chris:" + bcrypt.hashpw(b"secret", bcrypt.gensalt(4)) + b"\n")
    url = rig.start(AUTH_USERS_FILE=str(users)).url
    assert requests.get(f"{url}/", timeout=30).status_code == 401
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    browser.get(url.replace("//", "//chris:secret@") + "/")
    assert rows(browser)
    browser.execute_script("return refresh()")  # with the password, which the address that is fetched may not have
    assert not browser.find_element(By.ID, "offline").is_displayed()
    colors: list[str] = browser.execute_script(
        "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    )
    light, back = (sum(int(part) for part in re.findall(r"\d+", color)[:3]) for color in colors)
    assert light > 600
    assert back < 150
    browser.save_screenshot(str(tmp_path / "dark.png"))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# No heading of the table is broken within its word, which a line box more would show.
WHOLE_HEADINGS = """
return [...document.querySelectorAll("th")].every(heading => {
  const range = document.createRange();
  range.selectNodeContents(heading.firstChild);
  return range.getClientRects().length <= 1;
});
"""


@pytest.mark.parametrize("width", [*WIDTHS, 780, 920])
def test_jobs(browser: webdriver.Chrome, server: Server, tmp_path: Path, width: int) -> None:
    browser.get(f"{server.url}/")
    states = rows(browser)
    assert list(states) == ["brain-9", "brain-8", "brain-7"]
    assert "started" in states["brain-9"]
    assert re.search(r"\d+ (s|min) ago", states["brain-9"])  # it runs: when it was posted
    assert "exit code 3" in states["brain-8"]
    fits(browser, width, tmp_path / f"jobs-{width}.png")
    assert browser.execute_script(WHOLE_HEADINGS)
    no_barriers(browser)
    no_errors(browser)


def test_jobs_are_filtered_searched_and_sorted(browser: webdriver.Chrome, server: Server) -> None:
    browser.get(f"{server.url}/")
    browser.find_element(By.PARTIAL_LINK_TEXT, "finishedWithError 1").click()
    assert list(rows(browser)) == ["brain-8"]
    browser.find_element(By.PARTIAL_LINK_TEXT, "all 3").click()
    browser.find_element(By.LINK_TEXT, "jid").click()
    assert list(rows(browser)) == ["brain-7", "brain-8", "brain-9"]
    browser.find_element(By.LINK_TEXT, "jid").click()
    assert list(rows(browser)) == ["brain-9", "brain-8", "brain-7"]
    browser.find_element(By.ID, "text").send_keys("EXIT CODE 3")
    wait_for(lambda: list(rows(browser)) == ["brain-8"], 10, "what was searched for")
    assert "text=EXIT+CODE+3" in browser.current_url
    assert "sort=-jid" in browser.current_url
    browser.refresh()
    assert list(rows(browser)) == ["brain-8"]
    browser.find_element(By.ID, "text").send_keys(" and nothing else")
    wait_for(lambda: not rows(browser), 10, "no job")
    browser.get(f"{server.url}/")
    browser.find_element(By.CSS_SELECTOR, "#job-brain-8 .quiet").click()
    assert list(rows(browser)) == ["brain-9", "brain-8", "brain-7"]
    no_barriers(browser)
    browser.find_element(By.LINK_TEXT, "user tester (remove)").click()
    assert "user=" not in browser.current_url
    no_errors(browser)


def test_new_jobs_come_without_a_reload(browser: webdriver.Chrome, server: Server, rig: Rig) -> None:
    """What was selected stays so, although a row comes above it."""
    browser.get(f"{server.url}/?text=brain")
    browser.execute_script(
        "window.stays = 1; getSelection().selectAllChildren(document.querySelector('#job-brain-8 td'))"
    )
    server.post(rig.request("brain-10", "true"))
    server.wait_final("brain-10")
    wait_for(lambda: "finishedSuccessfully" in rows(browser).get("brain-10", ""), 15, "the new job")
    assert list(rows(browser)) == ["brain-10", "brain-9", "brain-8", "brain-7"]
    assert "finishedSuccessfully 2" in browser.find_element(By.ID, "jobs").text
    assert browser.execute_script("return [window.stays, getSelection().toString()]") == [1, "brain-8"]
    server.delete("brain-10")
    wait_for(lambda: "brain-10" not in rows(browser), 15, "the job to go")
    no_errors(browser)


def test_what_was_known_stays_while_pman_is_away(browser: webdriver.Chrome, rig: Rig) -> None:
    away = rig.start()
    browser.get(f"{away.url}/")
    away.kill()
    wait_for(lambda: "does not answer" in browser.find_element(By.ID, "offline").text, 15, "the word about it")
    assert "brain-7" in rows(browser)
    browser.get_log("browser")  # type: ignore[no-untyped-call] # that the connection is refused


def log(browser: webdriver.Chrome) -> str:
    return browser.find_element(By.ID, "log").text


@pytest.mark.parametrize("width", WIDTHS)
def test_one_job(browser: webdriver.Chrome, server: Server, tmp_path: Path, width: int) -> None:
    browser.get(f"{server.url}/")
    browser.find_element(By.LINK_TEXT, "brain-7").click()
    assert log(browser) == "<b>not bold</b>\nfine"
    wait_for(lambda: "This is all" in browser.find_element(By.ID, "tail").text, 10, "the end")
    assert log(browser) == "<b>not bold</b>\nfine"
    known = browser.find_element(By.ID, "job").text
    for each in ("finishedSuccessfully", "exit code\n0", "user\ntester", "image\nlocalhost/none:1", "memory", "UTC"):
        assert each in known, each
    fits(browser, width, tmp_path / f"job-{width}.png")
    no_barriers(browser)
    browser.execute_script("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    browser.find_element(By.CSS_SELECTOR, "[data-copy=cmd]").click()
    assert browser.execute_script("return window.copied") == server.get("brain-7").json()["cmd"]
    browser.find_element(By.LINK_TEXT, "What was submitted").click()
    assert "not bold" in browser.find_element(By.TAG_NAME, "pre").text
    assert browser.find_element(By.CSS_SELECTOR, "pre .tag").text == "claim"
    fits(browser, width, tmp_path / f"spec-{width}.png")
    no_barriers(browser)
    no_errors(browser)


def test_a_log_grows_and_leaves_its_reader_in_peace(browser: webdriver.Chrome, server: Server, rig: Rig) -> None:
    """What is selected and where the reader is stay; who is at the end stays at the end."""
    gate = f"until [ -e {rig.store}/$0-%s ]; do sleep 0.1; done; "
    script = f"seq 200; {gate % 1} seq 201 300; {gate % 2} seq 301 400; {gate % 3} printf end"
    server.post(rig.request("brain-11", script.replace("$0", "gate")))
    browser.get(f"{server.url}/jobs/brain-11/")
    box = browser.find_element(By.ID, "log")
    place = "return [log.scrollTop, Math.abs(log.scrollHeight - log.clientHeight - log.scrollTop) < 2]"
    place = f"const log = document.getElementById('log'); {place}"
    wait_for(lambda: box.text.endswith("200"), 15, "the first lines")
    assert browser.execute_script(place)[1]
    (rig.store / "gate-1").touch()
    wait_for(lambda: box.text.endswith("300"), 15, "more lines")
    assert browser.execute_script(place)[1]
    browser.execute_script(
        "getSelection().selectAllChildren(arguments[0].children[4]); arguments[0].scrollTop = 50", box
    )
    (rig.store / "gate-2").touch()
    wait_for(lambda: box.text.endswith("400"), 15, "lines while one is read")
    assert browser.execute_script(place) == [50, False]
    assert browser.execute_script("return getSelection().toString().trim()") == "5"
    browser.find_element(By.ID, "end").click()
    assert browser.execute_script(place)[1]
    (rig.store / "gate-3").touch()
    wait_for(lambda: box.text.endswith("end"), 15, "the end")
    assert box.text.split() == [*map(str, range(1, 401)), "end"]
    wait_for(lambda: "finishedSuccessfully" in browser.find_element(By.ID, "job").text, 10, "the state")
    no_errors(browser)


def test_a_log_goes_on_where_it_was_when_pman_comes_back(browser: webdriver.Chrome, rig: Rig) -> None:
    first = rig.start()
    gate = rig.store / "back"
    first.post(rig.request("brain-14", f"seq 50; until [ -e {gate} ]; do sleep 0.1; done; seq 51 60"))
    browser.get(f"{first.url}/jobs/brain-14/")
    box = browser.find_element(By.ID, "log")
    wait_for(lambda: box.text.endswith("50"), 15, "the first lines")
    first.kill()
    wait_for(lambda: "does not answer" in browser.find_element(By.ID, "tail").text, 10, "the word about it")
    gate.touch()
    second = rig.start(PORT=first.url.rpartition(":")[2])
    wait_for(lambda: box.text.endswith("60"), 15, "the rest")
    assert box.text.split() == [*map(str, range(1, 61))]
    wait_for(lambda: not browser.find_element(By.ID, "offline").is_displayed(), 10, "the page to be live again")
    browser.get_log("browser")  # type: ignore[no-untyped-call] # that the connection was refused
    second.delete("brain-14")


def test_a_log_as_a_terminal_shows_it(browser: webdriver.Chrome, server: Server, rig: Rig) -> None:
    script = r"""printf 'a\033[1;31mred\033[0m\n 1%%\r50%%\r100%%\n\033]0;title\007'; printf '%0400d' 7"""
    server.post(rig.request("brain-12", script))
    server.wait_final("brain-12")
    browser.get(f"{server.url}/jobs/brain-12/")
    wait_for(lambda: "This is all" in browser.find_element(By.ID, "tail").text, 10, "the end")
    assert log(browser).split("\n") == ["ared", "100%", f"{7:0400}"]
    assert browser.find_element(By.CSS_SELECTOR, "#log .b.c1").text == "red"
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.refresh()
    assert log(browser).split("\n") == ["ared", "100%", f"{7:0400}"]
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    browser.refresh()
    wide = "const log = document.getElementById('log'); return log.scrollWidth > log.clientWidth"
    assert not browser.execute_script(wide)
    browser.find_element(By.ID, "wrap").click()
    assert browser.execute_script(wide)
    copied = "document.addEventListener('copy', () => { window.copied = getSelection().toString(); })"
    browser.execute_script(f"{copied}; navigator.clipboard.writeText = () => Promise.reject()")
    browser.find_element(By.CSS_SELECTOR, "[data-copy=log]").click()
    wait_for(lambda: "Copied" in browser.find_element(By.CSS_SELECTOR, "#logs .tools").text, 5, "the copy")
    assert "ared\n100%" in browser.execute_script("return window.copied")
    link = browser.find_element(By.LINK_TEXT, "Download")
    text = requests.get(str(link.get_attribute("href")), timeout=30)
    assert (link.get_attribute("download"), text.text[:6]) == ("brain-12-0.log", "a\x1b[1;3")
    no_errors(browser)


def test_workers_have_tabs(browser: webdriver.Chrome, server: Server, rig: Rig, tmp_path: Path) -> None:
    server.post(rig.request("brain-13", 'echo "I am $$"', number_of_workers=3))
    server.wait_final("brain-13")
    browser.get(f"{server.url}/jobs/brain-13/")
    first = log(browser)
    browser.find_element(By.LINK_TEXT, "worker 2").click()
    assert log(browser) != first
    for width in WIDTHS:
        fits(browser, width, tmp_path / f"workers-{width}.png")
        no_barriers(browser)
    no_errors(browser)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_backend(browser: webdriver.Chrome, server: Server, tmp_path: Path, width: int) -> None:
    browser.get(f"{server.url}/")
    browser.find_element(By.LINK_TEXT, "Backend").click()
    known = browser.find_element(By.TAG_NAME, "main").text
    for each in ("can take jobs", "Where jobs run", "GiB", "This pman", "the newest 5000"):
        assert each in known, each
    fits(browser, width, tmp_path / f"backend-{width}.png")
    no_barriers(browser)
    no_errors(browser)


@pytest.mark.parametrize("width", WIDTHS)
def test_playground(browser: webdriver.Chrome, server: Server, tmp_path: Path, width: int) -> None:
    browser.get(f"{server.url}/render")
    target = Select(browser.find_element(By.ID, "target"))
    assert target.first_selected_option.text == "local"  # what this pman itself submits
    target.select_by_visible_text("wdl")
    wait_for(lambda: "workflow ChRISJob" in browser.find_element(By.ID, "result").text, 20, "the spec")
    wait_for(lambda: "accepts this" in browser.find_element(By.ID, "verdict").text, 20, "the verdict")
    tags = {tag.get_attribute("textContent") for tag in browser.find_elements(By.CLASS_NAME, "tag")}
    assert {"command", "resources", "directories"} <= tags
    fits(browser, width, tmp_path / f"render-{width}.png")
    no_barriers(browser)
    area = browser.find_element(By.ID, "request")
    browser.execute_script("arguments[0].value = arguments[0].value.replace(/(cpu_limit\\D+)\\d+/, '$1-5')", area)
    area.send_keys(" ")
    wait_for(lambda: "cpu_limit" in browser.find_element(By.ID, "verdict").text, 20, "the bad field")
    result = browser.find_element(By.ID, "result")
    assert "workflow ChRISJob" in result.text
    assert "stale" in str(result.get_attribute("class"))
    assert "rendered before" in browser.find_element(By.ID, "verdict").text
    browser.get_log("browser")  # type: ignore[no-untyped-call] # the 400 is meant


def test_a_link_keeps_target_and_request(browser: webdriver.Chrome, server: Server) -> None:
    browser.get(f"{server.url}/render")
    Select(browser.find_element(By.ID, "target")).select_by_visible_text("slurm")
    area = browser.find_element(By.ID, "request")
    browser.execute_script("arguments[0].value = arguments[0].value.replace(/it's/, 'ü & #+%')", area)
    area.send_keys(" ")
    shown = browser.find_element(By.ID, "result")
    wait_for(lambda: "ü & #+%" in shown.text, 20, "the spec")
    browser.execute_script("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    copied = {}
    for name in ("link", "result"):
        browser.find_element(By.CSS_SELECTOR, f"[data-copy={name}]").click()
        copied[name] = browser.execute_script("return window.copied")
    assert copied["result"].startswith("#!/bin/")  # without the names of the blocks
    browser.get("about:blank")
    browser.get(copied["link"])
    wait_for(lambda: "ü & #+%" in browser.find_element(By.ID, "result").text, 20, "the spec of the link")
    assert Select(browser.find_element(By.ID, "target")).first_selected_option.text == "slurm"
    no_errors(browser)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_that_is_not_there(browser: webdriver.Chrome, server: Server, tmp_path: Path, width: int) -> None:
    browser.get(f"{server.url}/jobs/brain-7/nowhere")
    assert "There is no such page." in browser.find_element(By.TAG_NAME, "main").text
    fits(browser, width, tmp_path / f"nowhere-{width}.png")
    no_barriers(browser)
    browser.find_element(By.LINK_TEXT, "Jobs").click()
    assert "brain-7" in rows(browser)
    browser.get_log("browser")  # type: ignore[no-untyped-call] # the 404 is meant


def test_the_pictures_of_the_documentation(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """The fixture says where there is no Chromium."""
    command = [sys.executable, "scripts/screenshots.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    made = {picture.name: picture.read_bytes() for picture in tmp_path.iterdir()}
    assert made.keys() == {picture.name for picture in (ROOT / "docs/images").glob("*.png")}
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 20_000 for picture in made.values())


def test_nothing_can_be_forged(server: Server, rig: Rig) -> None:
    """The one POST stores nothing, takes JSON only (a foreign form cannot send it), and pages refuse to be framed."""
    assert requests.post(f"{server.url}/render", data={"request": "{}", "target": "wdl"}, timeout=30).status_code == 415
    page = requests.get(f"{server.url}/render", timeout=30)
    assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
    assert "http://" not in page.text.replace(server.url, "")
    before = server.call("GET", "jobs/").json()
    body = {"request": '{"jid": 1}', "target": "wdl"}
    assert requests.post(f"{server.url}/render", json=body, timeout=30).status_code == 400
    assert server.call("GET", "jobs/").json() == before
