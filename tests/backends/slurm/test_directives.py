"""Values in `#SBATCH` lines arrive as one word and never make another directive."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pman import job
from pman.targets import slurm as targets_slurm
from tests.backends.slurm.fake import CONFIG, RENDERER
from tests.generate import requests


def read_by_sbatch(line: str) -> list[str]:
    r"""The words of the rest of a #SBATCH line, by sbatch's rules: quotes, # for comments, \ also inside quotes."""
    words: list[str] = []
    word, open_quote, escaped, started = "", "", False, False
    for character in line:
        if escaped:
            assert not character.isspace(), "SLURM 22.05.8 ends the word here"
            word, escaped = word + character, False
        elif character == "\\":
            escaped = started = True
        elif open_quote:
            if character == open_quote:
                open_quote = ""
            else:
                word += character
        elif character in "\"'":
            open_quote, started = character, True
        elif character == "#":
            break
        elif character.isspace() and character.isascii():
            words, word, started = ([*words, word] if started else words), "", False
        else:
            word, started = word + character, True
    assert not escaped
    assert not open_quote
    return [*words, word] if started else words


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1))
def test_a_value_is_one_word_of_a_directive(value: str) -> None:
    assert read_by_sbatch(f"--comment={targets_slurm.sbatch(value)}") == [f"--comment={value}"]


@pytest.mark.parametrize("value", ["a\nb", "a\r", "\x7f", "\t", "\0"])
def test_a_line_break_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="cannot stand"):
        targets_slurm.sbatch(value)


@given(requests(entrypoint=["sh"]))
def test_no_value_makes_a_directive(request: dict[str, object]) -> None:
    """sbatch reads #SBATCH lines up to the first line that is no comment."""
    made = job.make_job(job.validate(request), CONFIG)
    text = RENDERER.render(made, "slurm").text
    head = text[: text.index("\nset -u\n")].split("\n")
    assert head[0] == "#!/bin/bash"
    words = [read_by_sbatch(line.removeprefix("#SBATCH ")) for line in head[1:]]
    assert all(line.startswith("#SBATCH --") for line in head[1:])
    assert all(len(found) == 1 for found in words)
    names = [found[0].partition("=")[0] for found in words]
    assert len(names) == len(set(names))
    assert ['--account=a "b" c'] in words
    assert [f"--comment=org.chrisproject.pman.name={made.jid} site=it's #1 b=c"] in words
