"""Templates of a site: extending, shadowing, quoting that cannot be lost, errors that say where, bounds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import pytest

from pman import job, policy, settings, storage
from pman.errors import BadRequest, PmanError, Refused, TemplateError, TooLarge
from pman.targets import TARGETS
from pman.templating import render, sandbox, site

REQUEST: dict[str, Any] = {
    "jid": "chris-jid-1", "type": "ds", "auid": "cube", "image": "docker.io/lab/app:1", "entrypoint": ["app"],
    "args": ["it's", "<&>"], "number_of_workers": 2, "cpu_limit": 1500, "memory_limit": 512, "gpu_limit": 0,
    "env": ["A=it's <b>"],
}  # fmt: skip
Overlay = Callable[..., render.Renderer]


@pytest.fixture
def overlay(tmp_path: Path) -> Overlay:
    """Writes files (path -> text) into an overlay directory; the renderer that uses it."""

    def write(files: dict[str, str], **environment: str) -> render.Renderer:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        config = settings.load({"STOREBASE": "/store", "TEMPLATES_DIR": str(tmp_path), **environment})
        return render.Renderer(config, TARGETS)

    return write


def text(renderer: render.Renderer, target: str = "local", **fields: Any) -> str:
    config = settings.load({"STOREBASE": "/store"})
    return renderer.render(job.make_job(job.validate(REQUEST | fields), config), target).text


def shell(overlay: Overlay, body: str, **fields: Any) -> str:
    """What a shell template with this body renders to."""
    return text(overlay({"local/job.sh.j2": body}), **fields)


# -- overlays ------------------------------------------------------------------------------------------------------


def test_a_site_extends_a_shipped_template_by_one_block(overlay: Overlay) -> None:
    plain = text(overlay({}), "wdl")
    block = (
        '{% extends "shipped/wdl/job.wdl.j2" %}\n'
        "{% block site_attributes %}\n    account: {{ site.account }}\n{% endblock %}\n"
    )
    changed = text(overlay({"wdl/job.wdl.j2": block, "site.yaml": 'account: "lab 7"\n'}), "wdl")
    assert set(changed.splitlines()) - set(plain.splitlines()) == {'    account: "lab 7"'}
    assert set(plain.splitlines()) <= set(changed.splitlines())


def test_a_site_shadows_what_shipped_templates_include(overlay: Overlay) -> None:
    assert "my-runner" in text(overlay({"sh/runtime.sh.j2": "  set -- my-runner\n"}))


def test_super_and_macros_keep_their_text(overlay: Overlay) -> None:
    body = (
        '{% macro flag(name, value) %}--{{ name|lower ~ "=<" ~ value }} {% endmacro %}\n'
        "{% set both %}{{ flag('B', 'x&y') }}{% endset %}{{ both }}"
    )
    assert shell(overlay, body).strip() == "--'b=<x&y'"
    extended = '{% extends "shipped/local/job.sh.j2" %}{% block command %}{{ super() }}  # mine\n{% endblock %}'
    assert "'<&>'" in text(overlay({"local/job.sh.j2": extended}))


def test_extras_are_rendered_beside_the_spec(overlay: Overlay) -> None:
    config = settings.load({"STOREBASE": "/store", "CROMWELL_BACKEND": "SLURM"})
    spec = render.Renderer(config, TARGETS).render(render.sample_job(config), "wdl")
    assert '"backend": "SLURM"' in spec.extras["options.json"]


def test_a_site_refuses_a_job(overlay: Overlay) -> None:
    renderer = overlay({"local/job.sh.j2": '{% if "app" in job.image %}{{ refuse("not <here>") }}{% endif %}'})
    with pytest.raises(Refused, match=r"^not <here>$") as caught:
        text(renderer)
    assert caught.value.http_status == 403


def plain(value: Any) -> bool:
    """Whether templates reach only text, numbers, lists, mappings and pman's own frozen dataclasses below this."""
    if isinstance(value, Mapping):
        return all(map(plain, [*value.keys(), *value.values()]))
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    if type(value) in (job.Job, policy.Policy, policy.Bind, storage.Storage, storage.Mount):
        return all(plain(getattr(value, name)) for name in sandbox.members(value) if name != "on_host")
    return type(value) in (str, int, float, bool, type(None))


def test_templates_reach_plain_values_only(overlay: Overlay, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Watched(jinja2.Template):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            seen.extend(value for name, value in args[0].items() if name != "refuse")
            return super().generate(*args, **kwargs)

    overlay({"site.yaml": "a: 2024-01-01\nb: [{c: 1.5}, null, 16]\n"})
    config = settings.load(
        {"STOREBASE": "/s", "TEMPLATES_DIR": str(tmp_path), "JOB_LABELS": "a=b", "SLURM_IMAGE_DIR": "/i"}
    )
    renderer = render.Renderer(config, TARGETS)
    renderer.environment("slurm/job.sh.j2").template_class = Watched
    renderer.render(render.sample_job(config), "slurm")
    assert len(seen) == len(sandbox.VARIABLES) - 1
    assert [value for value in seen if not plain(value)] == []
    with pytest.raises(TemplateError, match="has no attribute"):
        shell(overlay, "{{ settings.templates_dir.joinpath('/proc/self/environ').read_bytes() }}")


def test_secrets_are_no_variables(overlay: Overlay) -> None:
    for name in render.SECRETS:
        with pytest.raises(TemplateError, match=f"has no attribute '{name}'"):
            shell(overlay, f"{{{{ settings.{name} }}}}")


# -- quoting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{{ "a\'b" }}', "'a'\"'\"'b'"),
        ('{{ "<&>" }}', "'<&>'"),
        ("{{ '<' ~ job.image }}", "'<docker.io/lab/app:1'"),
        ("{{ ('--x=<' ~ job.env[0][1])|sh }}", "'--x=<it'\"'\"'s <b>'"),
        ("{{ 1 + 2 }} {{ 1.5 }} {{ true }}", "3 1.5 true"),
        ("{{ ['a b', '<']|map('sh')|join(' ') }}", "'a b' '<'"),
        ("{{ ['a', '<']|join(':') }}", "'a:<'"),
        ("{{ 'a b'|upper|replace('A', '<') }}", "'< B'"),
        ("{{ '%s<' % 'a&' }}", "'a&<'"),
        ("{{ '{}<'.format('a&') }}", "'a&<'"),
        ("{% filter upper %}x{% endfilter %}", None),
        ("{{ '<b>'|safe }}", "<b>"),
    ],
)
def test_what_is_printed_is_one_literal(overlay: Overlay, body: str, expected: str | None) -> None:
    if expected is None:
        with pytest.raises(TemplateError, match="join first"):
            shell(overlay, body)
    else:
        assert shell(overlay, body) == expected


@pytest.mark.parametrize(
    "expression",
    [
        "'--x=<' ~ (job.image|sh)",
        "(job.image|sh) ~ '>'",
        "'<' + (job.image|sh)",
        "(job.image|sh) + '<'",
        "(job.image|sh) * 2",
        "(job.image|sh) % 1",
        "('%s'|sh) % '<'",
        "('{}'|sh).format('<')",
        "('a'|sh).join(['<'])",
        "job.image|sh|upper",
        "job.image|sh|replace('/', '<')",
        "['<', job.image|sh]|join(' ')",
        "job.argv|map('sh')|join(' && ')",
        "job.image|sh|sbatch",
        "super_text|sh",
        "(job.auid|sh)[1:-1]",
        "(job.auid|sh)[0]",
        "(job.auid|sh).strip()",
        "('a'|sh).escape(job.auid)",
        "('a'|sh)|attr('escape')",
        'job.auid|sh|trim("\'")',
        "job.auid|sh|reverse",
        "job.auid|sh|last",
        "job.auid|sh|indent",
        "[job.auid|sh]|map('trim', \"'\")|list",
        "[job.auid, job.auid|sh]",
        "{'zone': job.auid|sh}|sh",
    ],
)
def test_quoted_text_is_never_joined_to_other_text(overlay: Overlay, expression: str) -> None:
    body = "{% set super_text %}x{% endset %}\n\n{{ " + expression + " }}"
    with pytest.raises(TemplateError, match=r"job\.sh\.j2:3: .*quoted"):
        shell(overlay, body)


def test_a_number_where_kubernetes_takes_text_only(overlay: Overlay) -> None:
    with pytest.raises(TemplateError, match=r"int is not text; quotes in site\.yaml, or \|string, make it text"):
        text(overlay({"k8s/job.yaml.j2": "{{ job.cpu_cores|k8s }}"}), "k8s")
    assert text(overlay({"k8s/job.yaml.j2": "{{ job.cpu_cores|string|k8s }}"}), "k8s") == '"2"'


def test_map_marks_nothing_as_safe(overlay: Overlay) -> None:
    with pytest.raises(TemplateError, match=r"job\.sh\.j2:1: map cannot mark values as safe"):
        shell(overlay, "{{ [job.auid]|map('sa' ~ 'fe')|join(' ') }}")


@pytest.mark.parametrize(
    ("name", "filters"),
    [("local/job.sh.j2", ["sh", "sbatch"]), ("wdl/job.wdl.j2", ["sh", "wdl"]), ("k8s/job.yaml.j2", ["yaml", "k8s"])],
)
def test_a_language_has_its_own_filters_only(overlay: Overlay, name: str, filters: list[str]) -> None:
    target = name.partition("/")[0]
    for known in (name for target in TARGETS.values() for name in target.filters):
        renderer = overlay({name: f"{{{{ job.auid|{known} }}}}"}, APPLICATION_MODE="dev")
        if known in filters or (target, known) == ("k8s", "gotemplate"):
            assert "cube" in text(renderer, target)
        else:
            with pytest.raises(TemplateError, match=rf"\|{known} writes another language"):
                text(renderer, target)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{{ 'gpu:' ~ job.partition }}", "None is not text"),
        ("{{ job.partition|string }}", "None is not text"),
        ("{{ job.partition|upper }}", "None is not text"),
        ("{{ ['a', none]|join(',') }}", "None is not text"),
        ("{{ 'a=' ~ site.flag }}", "True is not text"),
        ("{{ 'a=%s' % site.flag }}", "True is not text"),
        ("{{ job.argv }}", "tuple is not text; a `for` or |join writes its parts"),
        ("{% for m in site.word %}{{ m }}{% endfor %}", "a list is needed here, not the text 'cuda'"),
        ("{% for m in site.word if m == 'd' %}{% else %}{{ m }}{% endfor %}", "a list is needed here"),
        ("{{ site.word|map('upper')|list }}", "a list is needed here"),
        ("{{ site.word|join(' ') }}", "a list is needed here"),
        (
            "{% set time_limit_minutes = site.word %}",
            "time_limit_minutes must be a whole number of minutes above 0 or none",
        ),
        ("{% set time_limit_minutes = true %}", "time_limit_minutes must be a whole number of minutes above 0 or none"),
        ("{% set partition = ['a'] %}", "partition must be text or none, not"),
        (
            "{% set time_limit_minutes = -5 %}",
            "time_limit_minutes must be a whole number of minutes above 0 or none, not -5",
        ),
        (
            "{% set time_limit_minutes = 0 %}",
            "time_limit_minutes must be a whole number of minutes above 0 or none, not 0",
        ),
        ("{% set image = none %}", "image must be an image reference, not None"),
        ("{% set image = site.images.x %}", "has no attribute 'images'"),
        ("{% set partition = 'gpu' if job.gpu_count %}", "an inline `if` without `else` has no value here"),
        ("{% set image = '' %}", "image must be an image reference, not ''"),
        ("{% set image %}m/{{ job.image }}{% endset %}", "write {% set image = ... %}"),
        ("{% set image = job.image|sh %}", "image must be an image reference, not Markup"),
        ("{% for a in range(30) %}{% set x = namespace(s='a' * 999999) %}{% endfor %}{{ x }}", "'x' is undefined"),
        (
            "{% set x = namespace(s='ab') %}{% for a in range(40) %}{% set x.s = x.s ~ x.s %}{% endfor %}",
            "a text of more than 4194304 characters is too much",
        ),
        ("{{ 'a'.ljust(900000000)|length }}", "ljust() would make a value that is too large"),
        ("{{ '%900000000d' % 1 }}", "a width of millions is too much"),
    ],
)
def test_python_does_not_shine_through(overlay: Overlay, body: str, said: str) -> None:
    with pytest.raises(TemplateError) as caught:
        text(overlay({"local/job.sh.j2": "\n" + body, "site.yaml": "word: cuda\nflag: true\n"}))
    assert "local/job.sh.j2:2: " in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["e", "escape", "forceescape", "tojson", "urlize", "xmlattr", "striptags", "center"])
def test_filters_that_make_html_are_no_filters_here(overlay: Overlay, name: str) -> None:
    with pytest.raises(TemplateError, match=rf"job\.sh\.j2:1: No filter named '{name}'"):
        shell(overlay, f"{{{{ job.image|{name} }}}}")


def test_only_blocks_of_a_template_that_extends_are_rendered(overlay: Overlay) -> None:
    shipped, around = (
        text(overlay({})),
        "\nx{{ job.jid }}\n{% block prologue %}{% endblock %}{% if job %}y{% endif %}\n",
    )
    extending = around + '{% extends "shipped/local/job.sh.j2" %}\nz\n'
    assert text(overlay({"local/job.sh.j2": extending})) == shipped


def test_shipped_names_are_never_the_sites_own(overlay: Overlay) -> None:
    files = {"shipped/local/job.sh.j2": "x", "local/job.sh.j2": '{% extends "shipped/local/job.sh.j2" %}'}
    assert text(overlay({})) == text(overlay(files))


def test_values_are_never_templates(overlay: Overlay) -> None:
    assert "'{{ 7 * 7 }}'" in text(overlay({}), args=["{{ 7 * 7 }}"])


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "line", "said"),
    [
        ("a\n{{ jobb.image }}", 2, "'jobb' is undefined; did you mean job?"),
        ("a\n\n{{ job.imag }}", 3, "did you mean image"),
        ("{{ job.cpu_core }}", 1, "job has no attribute 'cpu_core'; did you mean cpu_cores"),
        ("{{ storage.incomming.source }}", 1, "did you mean incoming"),
        ("{{ settings.storbase }}", 1, "this mapping has no attribute 'storbase'; did you mean storebase"),
        ("{{ site.acount }}", 1, "this mapping has no attribute 'acount'; did you mean account"),
        ("{{ job.image|shh }}", 1, "No filter named 'shh'; did you mean sh"),
        ("{% if job.image is strng %}{% endif %}", 1, "No test named 'strng'; did you mean string"),
        ("a\n{% block x %}\nb", 3, "'endblock'"),
        ("a\n{% fi %}", 2, "unknown tag 'fi'"),
        ("a\n{{ job.partition }}", 2, "NoneType is not text; say what should be written where it is absent"),
        ("\n\n{{ job.workers / 0 }}", 3, "division by zero"),
        ("\n{% include 'sh/nothing.sh.j2' %}", 2, "there is no template sh/nothing.sh.j2"),
        ("\n{% extends 'shipped/local/jobs.sh.j2' %}", 2, "there is no template shipped/local/jobs.sh.j2"),
        ("{% for a in job.argv %}\n\n{{ a.nme }}{% endfor %}", 3, "has no attribute 'nme'"),
        ("{{ job.image }}\n{% if undefined_name %}{% endif %}", 2, "'undefined_name' is undefined"),
        ("{{ 1 if job.gpu_count }}", 1, "an inline `if` without `else` has no value here"),
        ("{% macro a() %}\n{{ a() }}{% endmacro %}{{ a() }}", 2, "a template, block or macro that brings in itself"),
        ("\n{{ job.image\n ~ jb }}", 2, "'jb' is undefined"),
    ],
)
def test_errors_name_file_line_and_what_was_meant(overlay: Overlay, body: str, line: int, said: str) -> None:
    with pytest.raises(TemplateError) as caught:
        text(overlay({"local/job.sh.j2": body, "site.yaml": "account: lab\n"}))
    assert f"local/job.sh.j2:{line}: " in str(caught.value)
    assert said in str(caught.value)


def test_an_error_in_a_shipped_block_names_the_shipped_file(overlay: Overlay) -> None:
    renderer = overlay({"sh/runtime.sh.j2": "\n\n{{ nothing }}"})
    with pytest.raises(TemplateError, match=r"sh/runtime\.sh\.j2:3: 'nothing' is undefined"):
        text(renderer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", ":3: the key 'a' is given twice"),
        ("x:\n  a: 1\n  a: 2\n", ":3: the key 'a' is given twice"),
        ("- a\n", ":1: site.yaml must be a mapping"),
        ("a: [1\nb: 2\n", ":2: "),
        ("a: !!python/object:os.system x\n", ":1: python/object:os.system is no type"),
        ("? [a]\n: 1\n", ":1: "),
        ("b: 1\na: !!set {b, c}\n", ":2: set is no type"),
        ("a: 1\nlimit: 12:30:00\n", ":2: 12:30:00 would be 45000: write the value that you mean, in quotes if"),
        ("version: 1.10\n", ":1: 1.10 would be 1.1"),
        ("a: [1, 010]\n", ":1: 010 would be 8"),
        ("no: norway\n", ":1: no would be false"),
        ("a: .inf\n", ":1: .inf would be no finite number"),
        ("a: \x01\n", ":1: "),
        ("a: " + "[" * 2000 + "\n", ":1: "),
    ],
)
def test_site_yaml_is_read_strictly(overlay: Overlay, content: str, said: str) -> None:
    with pytest.raises(TemplateError) as caught:
        overlay({"site.yaml": content})
    assert f"site.yaml{said}" in str(caught.value)


def test_site_yaml_that_is_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(TemplateError, match=r"site\.yaml:1: .*UTF-8"):
        site.read_site(tmp_path)


def test_scalars_are_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("a: [1, -2, 1.5, 1.0e+16, true, False, null, ~, 1e3, 0o7, y, =, '010', 1:99]\n")
    values = [1, -2, 1.5, 1e16, True, False, None, None, "1e3", "0o7", "y", "=", "010", "1:99"]
    assert site.read_site(tmp_path) == {"a": values}


def test_dates_are_text_and_mappings_merge(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("day: 2024-13-45\nbase: &b {x: 1, y: 1}\nk8s:\n  <<: *b\n  y: 2\n")
    assert site.read_site(tmp_path) == {"day": "2024-13-45", "base": {"x": 1, "y": 1}, "k8s": {"x": 1, "y": 2}}


def test_no_site_yaml_is_no_values(tmp_path: Path) -> None:
    assert site.read_site(tmp_path) == {}
    (tmp_path / "site.yaml").write_text("# nothing yet\n")
    assert site.read_site(tmp_path) == {}


def test_a_value_that_the_language_cannot_carry_is_a_bad_request(overlay: Overlay) -> None:
    with pytest.raises(
        BadRequest, match=r"input_dir: cannot be written .*a line break cannot stand in a WDL"
    ) as caught:
        text(overlay({}), "wdl", input_dir="a\nb")
    assert "job.wdl.j2:" in caught.value.detail


def test_a_line_break_in_a_line_for_sbatch_is_a_bad_request(overlay: Overlay) -> None:
    body = "#SBATCH --wckey={{ job.auid|sbatch }}\n"
    with pytest.raises(BadRequest, match=r"^auid: .*a control character cannot stand in a #SBATCH line"):
        text(overlay({"slurm/job.sh.j2": body}), "slurm", auid="a\nb")


# -- the sandbox ---------------------------------------------------------------------------------------------------

LOOPS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop that prints nothing": (
        "{% set x = namespace(n=0) %}{% for a in range(99999) %}{% for b in range(99999) %}{% set x.n = b %}"
        "{% endfor %}{% endfor %}"
    ),
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [[1, 2]] * 2 recursive %}{{ loop([[1], [2]]) }}{{ loop([[1], [2]]) }}{% endfor %}",
    "tests of lists": "{{ range(99999)|select('in', range(99999)|select('odd')|list)|list }}",
    "filters of filters": "{% for a in range(999) %}{{ range(99999)|map('string')|list|length }}{% endfor %}",
    "filters of loops": "{% for a in range(99999) %}{{ range(99999)|sum if true }}{% endfor %}",
}


@pytest.mark.slow
@pytest.mark.parametrize("body", LOOPS.values(), ids=LOOPS)
def test_a_template_that_loops_for_ever_is_stopped_in_any_thread(
    overlay: Overlay, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "MAX_RENDER_SECONDS", 0.5)
    renderer, errors = overlay({"local/job.sh.j2": "\n" + body}), list[PmanError]()

    def attempt() -> None:
        try:
            text(renderer)
        except PmanError as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert isinstance(errors[0], TemplateError)
    assert "job.sh.j2:" in str(errors[0])
    assert "loop" in str(errors[0]) or "recursion" in str(errors[0])


def test_templates_that_include_each_other_are_stopped(overlay: Overlay) -> None:
    files = {"local/job.sh.j2": "{% include 'sh/a.sh.j2' %}", "sh/a.sh.j2": "{% include 'sh/a.sh.j2' %}"}
    with pytest.raises(TemplateError, match="brings in itself"):
        text(overlay(files))


@pytest.mark.parametrize(
    "body",
    [
        "{% for a in range(90000) %}{% for b in range(90000) %}0123456789{% endfor %}{% endfor %}",
        "{% for a in range(90) %}{{ 'é' * 100000 }}{% endfor %}",
        "{% set x %}{% for a in range(50) %}{{ 'x' * 100000 }}{% endfor %}{% endset %}{{ x }}",
    ],
)
def test_more_than_four_mebibytes_are_stopped(overlay: Overlay, body: str) -> None:
    with pytest.raises(TooLarge, match=r"local/job\.sh\.j2 renders to more than 4194304 bytes"):
        shell(overlay, body)


@pytest.mark.parametrize("body", ["{{ 'x' * 10000000000 }}", "{{ 10 ** 1000000000 }}", "{{ [0] * 1000000000 }}"])
def test_single_operations_are_bounded_too(overlay: Overlay, body: str) -> None:
    with pytest.raises(TemplateError, match="would make a value that is too large"):
        shell(overlay, body)


@pytest.mark.parametrize(
    "body",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ refuse.__globals__ }}",
        "{{ job.__class__ }}",
        "{{ settings._fields }}",
        "{{ self._TemplateReference__context }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ ('{0.__class__}').format(job) }}",
        "{{ job|attr('__class__') }}",
        "{{ [].append(1) }}",
        "{{ site.pop('a') }}",
        "{{ lipsum() }}",
    ],
)
def test_python_is_out_of_reach(overlay: Overlay, body: str) -> None:
    with pytest.raises(TemplateError, match=r"job\.sh\.j2:1: "):
        text(overlay({"local/job.sh.j2": body, "site.yaml": "a: 1\n"}))


@pytest.mark.parametrize(
    "name", ["../../secret.sh.j2", "/etc/passwd", "shipped/../../pyproject.toml", "a/../../x.sh.j2"]
)
def test_includes_stay_in_the_template_directories(overlay: Overlay, tmp_path: Path, name: str) -> None:
    (tmp_path.parent / "secret.sh.j2").write_text("secret")
    with pytest.raises(TemplateError, match="there is no template"):
        shell(overlay, f"{{% include {name!r} %}}")


def test_symbolic_links_stay_in_the_template_directories(overlay: Overlay, tmp_path: Path) -> None:
    outside = tmp_path.parent / "outside.sh.j2"
    outside.write_text("secret")
    renderer = overlay({"local/job.sh.j2": "{% include 'sh/a.sh.j2' %}", "sh/b.sh.j2": "fine"})
    (tmp_path / "sh" / "a.sh.j2").symlink_to(outside)
    with pytest.raises(TemplateError, match="a symbolic link leads out of the template directory"):
        text(renderer)
    (tmp_path / "sh" / "a.sh.j2").unlink()
    (tmp_path / "sh" / "a.sh.j2").symlink_to(tmp_path / "sh" / "b.sh.j2")  # as a ConfigMap's files are
    assert text(renderer) == "fine"


# -- the rest ------------------------------------------------------------------------------------------------------


def test_production_compiles_once_and_dev_reloads(overlay: Overlay, tmp_path: Path) -> None:
    files = {"local/job.sh.j2": "one {{ site.a }}", "site.yaml": "a: 1\n"}
    production, dev = overlay(files), overlay({}, APPLICATION_MODE="dev")
    assert (text(production), text(dev)) == ("one 1", "one 1")
    (tmp_path / "local/job.sh.j2").write_text("two and more {{ site.a }}")
    (tmp_path / "site.yaml").write_text("a: 2\n")
    assert (text(production), text(dev)) == ("one 1", "two and more 2")


def test_origins_name_the_line_that_each_line_comes_from(overlay: Overlay, tmp_path: Path) -> None:
    files = {
        "local/job.sh.j2": (
            '{% extends "shipped/local/job.sh.j2" %}\n\n{% block prologue %}\n{# note #}\nfirst\n'
            "second {{ job.jid }}\n{% for word in job.argv[1:3] %}\nword {{ word }}\n{% endfor %}\n"
            "{% include 'sh/more.sh.j2' %}\n{% endblock %}\n"
        ),
        "sh/more.sh.j2": "more\nand more\n",
    }
    renderer = overlay(files)
    config = settings.load({"STOREBASE": "/store"})
    made = job.make_job(job.validate(REQUEST), config)
    lines = renderer.render(made, "local").text.splitlines()
    origins = renderer.origins(made, "local/job.sh.j2")
    assert len(origins) == len(lines)
    site = str(tmp_path / "local/job.sh.j2")
    found = {line: origin for line, origin in zip(lines, origins, strict=True) if origin[0].startswith(str(tmp_path))}
    assert found["first"] == (site, 5)
    assert found["second chris-jid-1"] == (site, 6)
    assert found["word '<&>'"] == (site, 8)
    assert found["and more"] == (str(tmp_path / "sh/more.sh.j2"), 2)
    included = {piece.block for piece in renderer.pieces(made, "local/job.sh.j2") if "and more" in piece.text}
    assert included == {"prologue"}
    shipped = dict(zip(lines, origins, strict=True))["set -u"]
    text_of = Path(shipped[0]).read_text().splitlines()
    assert text_of[shipped[1] - 1] == "set -u"
