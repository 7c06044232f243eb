"""Recipes that were made to harm are refused in one sentence."""

import gc

import pytest

from pipelines.config.reader import RecipeError, load_recipe
from raydit.regular_files import FileTooLarge

DOTS = ".".join("a" * 50_000)
REFUSED = {
    "x = " + "[" * 5000: "not TOML: nested too deeply",
    f"{DOTS} = 1": "a key of more than 32 parts .at line 1",
    f"\n[{DOTS}]": "a key of more than 32 parts .at line 2",
    "x = " + "1" * 5000: "not TOML: Exceeds the limit",
    "x = 0x" + "f" * 5000: "found values with a number of thousands of digits",
    f"x = {{{'.'.join('a' * 2000)} = 1}}": "found values nested too deeply",
    "x = 2020-99-99": "not TOML",
}


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_hostile_recipes_are_refused(tmp_path, number):
    text, message = [*REFUSED.items()][number]
    (tmp_path / "recipe.toml").write_text(text)
    gc.collect()  # a warning about another test's files, raised deep in the parser's recursion, would fail this one
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "recipe.toml")


def test_a_recipe_without_end_is_refused(tmp_path):
    (tmp_path / "recipe.toml").write_text("#" * 2**21)
    with pytest.raises(FileTooLarge, match="found 2,097,152 bytes, expected at most 1,048,576"):
        load_recipe(tmp_path / "recipe.toml")


@pytest.mark.parametrize("override", ["a" + ".a" * 5000 + "=1", "x=" + "[" * 5000, "x=" + "1" * 5000])
def test_hostile_overrides_are_refused(tmp_path, override):
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(RecipeError):
        load_recipe(tmp_path / "recipe.toml", (override,))


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    (tmp_path / "recipe.toml").write_bytes(b"\xef\xbb\xbfwrong = 1\n")
    with pytest.raises(RecipeError, match=r"recipe.toml:1: wrong: unknown key"):
        load_recipe(tmp_path / "recipe.toml")


def test_lines_may_end_as_on_any_system(tmp_path):
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "recipe.toml").write_bytes(f"wrong = 1{end}also = 2{end}".encode())
        with pytest.raises(RecipeError, match=r"recipe.toml:2: also: unknown key"):
            load_recipe(tmp_path / "recipe.toml")
