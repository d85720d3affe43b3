"""Tables of styles, as deployments write them and as the webui does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.webui.styles import Style, read_styles

CSV = """\ufeffname,prompt,negative_prompt
# a comment,x,y
"Film, old","grainy, {prompt}, 1950s", "colors"
plain, a thing
"""


def test_a_table_is_json_a_file_of_it_or_a_styles_csv_of_the_webui(tmp_path: Path) -> None:
    wanted = {
        "Film, old": Style(prompt="grainy, {prompt}, 1950s", negative_prompt="colors"),
        "plain": Style(prompt="a thing"),
    }
    (tmp_path / "styles.csv").write_text(CSV)
    assert read_styles(str(tmp_path / "styles.csv")) == wanted
    table = json.dumps(
        {
            "Film, old": {"prompt": "grainy, {prompt}, 1950s", "negative_prompt": "colors"},
            "plain": {"prompt": "a thing"},
        }
    )
    (tmp_path / "styles.json").write_text(table)
    assert read_styles(str(tmp_path / "styles.json")) == wanted
    assert read_styles(table) == wanted
    assert read_styles("") == {}
    old = tmp_path / "old.csv"
    old.write_text("name,text\nplain,a thing\n")
    assert read_styles(str(old)) == {"plain": Style(prompt="a thing")}


@pytest.mark.parametrize("told", ["/nowhere/styles.csv", '{"a": 1}', "{", '{"a": {"prompt": 1}}'])
def test_a_table_that_can_not_be_read_says_why(told: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        read_styles(told)


def test_a_file_without_names_is_no_table(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("a cat\na dog\n")
    with pytest.raises(ValueError, match=r"no styles\.csv"):
        read_styles(str(file))
