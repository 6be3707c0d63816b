"""Job requests and values that try to break what they are pasted into, for generated tests."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

HOSTILE = (
    "", " ", "'", '"', "`", "\\", "\\\\", "\\n", "\n", "\n\n", "\r\n", "a\r\nb", "\r", "\t", "  two\n  lines\n",
    "$x", "$$", "$(x)", "$(PMAN_WORKER_COUNT)", "$$(x)", "${x}", "~{x}", "~", "~root", ">>>", "<<<", "}",
    "{{.Node.ID}}", "{{", "}}", "{{{", '{{"{{"}}', "{% raw %}", "{# c #}", "%s", "%%", "%d%n", "-n", "--", "-e",
    "!", "!!", "#", "# c", ";", "&& true", "|", "*", "?", "[a]", "(", ")", "<", ">", "&amp;", "&", "<b>", "EOF",
    "x\n#PBS -q no-such\n", "x\n#BSUB -q no-such\n",
    "SCRIPT_EPILOGUE", "SCRIPT_CLOSURE", "DOCKER_OUTPUT_DIR_LINK", "INSTANTIATED_COMMAND", "ENVIRONMENT_VARIABLES",
    "\\137", "\\055", "\x07", "\x1b[0m", "\x7f", "\x85", "\u2028", "\ufeff", "\u00e9", "e\u0301", "\U0001f9e0",
    "\uffff", "null", "yes", "0x10", "1e3", ": ", "- a", "? b", "@", "/share/incoming", "/share/incoming/x",
    "/share/outgoing", "/share", "=", "a=b",
)  # fmt: skip
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
TEXTS = st.lists(st.sampled_from(HOSTILE) | ANY_TEXT, max_size=4).map("".join)
NAMES = st.from_regex(r"[A-Z][A-Z0-9_]{0,7}Q", fullmatch=True)  # none that a shell, a loader or a library obeys
ENVIRONMENTS = st.lists(st.tuples(NAMES, TEXTS), max_size=4, unique_by=lambda pair: pair[0])
_PART = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=8)
PATHS = st.lists(
    (_PART | st.sampled_from([t for t in HOSTILE if t and "/" not in t])).filter(lambda part: part not in (".", "..")),
    min_size=1,
    max_size=3,
).map("/".join)
IMAGES = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "docker.io/", "registry.example.org:5000/lab/", "[::1]:5000/"]),
    st.from_regex(r"[a-z0-9]{1,8}((\.|_|__|-{1,3})[a-z0-9]{1,4})?", fullmatch=True),
    st.sampled_from(["", ":2.1.0", ":A_b.c-9", "@sha256:" + "0aB1" * 16]),
)
JIDS = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="/?#%"), min_size=1, max_size=60).filter(
    lambda jid: jid not in (".", "..", "jobs", "openapi.json", "backend.json")
)


@st.composite
def requests(draw: st.DrawFn, entrypoint: list[str] | None = None) -> dict[str, Any]:
    """The JSON of an acceptable request, with every field as hostile as it may be."""
    optional = {
        "time_limit_minutes": st.integers(1, 10_000),
        "partition": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._,@+-]{0,9}", fullmatch=True),
        "input_dir": PATHS,
        "output_dir": PATHS,
    }
    return {
        "jid": draw(JIDS),
        "type": draw(st.sampled_from(["ds", "fs", "ts"])),
        "auid": draw(TEXTS),
        "image": draw(IMAGES),
        "entrypoint": entrypoint or ["program", *draw(st.lists(TEXTS, max_size=2))],
        "args": draw(st.lists(TEXTS, max_size=6)),
        "env": [f"{name}={value}" for name, value in draw(ENVIRONMENTS)],
        "number_of_workers": draw(st.integers(1, 1024)),
        "cpu_limit": draw(st.integers(1, 10_000_000)),
        "memory_limit": draw(st.integers(1, 100_000_000)),
        "gpu_limit": draw(st.integers(0, 1024)),
        **{name: draw(value) for name, value in optional.items() if draw(st.booleans())},
    }
