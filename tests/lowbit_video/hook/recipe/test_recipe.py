"""A recipe's file: what is read is what was written, what cannot be meant names file and rule, the last match wins."""
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lowbit_video import Recipe
from lowbit_video.hook.recipe.rule import Rule, heads_text, steps_text
from lowbit_video.hook.recipe.table import LayerPlan, Span
from lowbit_video.hook.recipe.toml import read_toml, write_toml
from lowbit_video.precision import PRESETS


class Model:
    """As much of a model as a recipe looks at: layers a.attn and b.attn, of 4 and 2 heads, and what takes no processor."""

    def named_modules(self):
        attention = lambda heads: SimpleNamespace(heads=heads, processor=None, to_q=None)
        return [("", self), ("a", SimpleNamespace()), ("a.attn", attention(4)), ("b.attn", attention(2))]


def spans(recipe, layer="a.attn"):
    return [(span.start, span.end, span.rungs) for span in recipe.resolve(Model()).layers[layer].spans]


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return path
    return write


def test_the_last_rule_that_meets_a_cell_wins():
    recipe = Recipe([{"rung": "int8+fp8"}, {"layers": "a.*", "heads": [0, 3], "rung": "int4+fp16"},
                     {"steps": "0.0-0.25", "rung": "int8+fp16"},
                     {"layers": "a.*", "heads": "3", "steps": "0.2-0.5", "rung": "exact"}])
    low, high = "int8+fp8", "int8+fp16"
    assert spans(recipe) == [(0.0, 0.2, (high,) * 4), (0.2, 0.25, (high, high, high, "exact")),
                             (0.25, 0.5, ("int4+fp16", low, low, "exact")), (0.5, 1.0, ("int4+fp16", low, low, "int4+fp16"))]
    assert spans(recipe, "b.attn") == [(0.0, 0.25, (high,) * 2), (0.25, 1.0, (low,) * 2)]
    assert recipe.resolve(Model()).has_steps and not Recipe([{"rung": "exact"}]).resolve(Model()).has_steps


def test_its_rungs_are_each_named_once_in_the_order_of_its_rules():
    rules = [{"rung": "int8+fp8"}, {"steps": "0-0.2", "rung": "exact"}, {"heads": [0], "rung": "int8+fp8 pooled 0.3"},
             {"layers": "a.*", "rung": "exact"}]
    assert Recipe(rules).rungs == ("int8+fp8", "exact", "int8+fp8 pooled 0.3")


def test_spans_that_are_alike_are_one():
    recipe = Recipe([{"rung": "int8+fp8"}, {"steps": "0-0.5", "rung": "exact"}, {"steps": "0.3-0.7", "rung": "exact"}])
    assert spans(recipe) == [(0.0, 0.7, ("exact",) * 4), (0.7, 1.0, ("int8+fp8",) * 4)]


def test_a_step_belongs_to_the_span_that_it_begins_in():
    plan = LayerPlan((Span(0.0, 0.2, ("exact",)), Span(0.2, 1.0, ("int8+fp8",))))
    assert [plan.at(share).rungs[0] for share in (0.0, 0.19999, 0.2, 0.5, 1.0)] == ["exact"] * 2 + ["int8+fp8"] * 3


def test_shares_and_groups_and_the_table_as_text():
    recipe = Recipe([{"rung": "int8+fp8"}, {"layers": "b.*", "rung": "exact"},
                     {"heads": "1", "steps": "0.5-1", "rung": "exact"}])
    table = recipe.resolve(Model())
    assert table.shares() == pytest.approx({"int8+fp8": 3.5 / 6, "exact": 2.5 / 6}) and list(table.shares())[0] == "int8+fp8"
    assert table.layers["a.attn"].spans[1].groups() == {"int8+fp8": (0, 2, 3), "exact": (1,)}
    assert str(table).splitlines() == ["a.attn  steps 0-0.5  int8+fp8",
                                       "a.attn  steps 0.5-1  int8+fp8 (heads 0,2-3), exact (heads 1)",
                                       "b.attn  steps 0-1  exact"]


def test_what_is_saved_is_what_is_loaded(tmp_path):
    about = {"model": "a \"b\"\\c\n\x7f ü", "prompts": ["one", "two"], "seed": 3, "predicted_error_db": 41.25, "title": "x"}
    second = {"layers": ["a.*", "b.*"], "heads": [0, 1, 3], "steps": [0, 0.125], "rung": "fp16"}
    recipe = Recipe([Rule("int8/int4+fp16"), second], about)
    recipe.save(tmp_path / "r.toml")
    again = Recipe.load(tmp_path / "r.toml")
    assert again == recipe and again.about == about and again.source == str(tmp_path / "r.toml")
    assert 'heads = "0-1,3"\nsteps = "0-0.125"\n' in (tmp_path / "r.toml").read_text()
    assert hash(again) == hash(recipe) and again != Recipe([{"rung": "fp16"}], about)


def test_a_table_of_every_kind_of_value_survives(tmp_path):
    tables = {"e": np.float64(0.5), "a": 1, "b": {"odd key": True, "f": 1e-7, "l": []},
              "c": [{"x": "y"}, {"x": "z"}], "d": [1, 2.5, "t"]}
    write_toml(tmp_path / "t.toml", tables)
    assert read_toml(tmp_path / "t.toml") == tables
    with pytest.raises(TypeError, match="not None"):
        write_toml(tmp_path / "t.toml", {"a": None})


@pytest.mark.parametrize("rule, says", [
    ('rung = "pooled"', "there is no rung 'pooled'; there are: fp16, .*int8\\+fp8"),
    ('rung = "int8+fp8 pooled"', "there is no rung"), ('rung = "int8+fp8 pooled 1.5"', "keep is 1.5"),
    ('rung = "exact pooled 0.3"', "there is no rung 'exact pooled 0.3'; .* low-bit ones with pooled keys"),
    ('rung = "int8+fp8 pooled 0.3 x"', "there is no rung"),
    ('rung = "int8+fp8 rotate pooled 0.3"', "there is no rung .* keys that are rotated are not pooled"),
    ('rung = "int8+fp8 pooled 0.3 rotate"', "there is no rung 'int8.fp8 pooled 0.3 rotate': keys that are rotated are not"),
    ('rung = 8', "there is no rung 8"),
    ('layers = "a.*"', "it has no rung"),
    ('rung = "exact"\nhead = [0]', "unknown key 'head'; there are: layers, heads, steps, rung"),
    ('rung = "exact"\nlayers = []', "layers is"),
    ('rung = "exact"\nheads = []', "heads is"),
    ('rung = "exact"\nheads = "3-1"', "heads is '3-1', which counts backwards"),
    ('rung = "exact"\nheads = "a"', "heads is 'a'"),
    ('rung = "exact"\nheads = [-1]', "heads is -1; give at least 0"),
    ('rung = "exact"\nheads = [true]', "heads is True"),
    ('rung = "exact"\nsteps = "0.5-0.2"', "steps is 0.5-0.2; give shares of the denoising in order"),
    ('rung = "exact"\nsteps = "0.2-0.2"', "steps is 0.2-0.2"),
    ('rung = "exact"\nsteps = "0-1.1"', "steps is 0-1.1"),
    ('rung = "exact"\nsteps = "first"', "steps is 'first'"),
    ('rung = "exact"\nsteps = [0.5]', "steps is"),
    ('rung = "exact"\nsteps = [0, true]', "steps is"),
])
def test_a_rule_that_cannot_be_meant_names_file_and_rule(file, rule, says):
    path = file(f'format = 1\n[[rules]]\nrung = "int8+fp8"\n[[rules]]\n{rule}\n')
    with pytest.raises(ValueError, match=f"mine.toml, rule 2: {says}"):
        Recipe.load(path)


@pytest.mark.parametrize("text, says", [
    ("rules = [", "is not valid TOML"),
    ("format = 2\n[[rules]]\nrung='exact'", "has format 2; this version reads format = 1"),
    ("[[rules]]\nrung='exact'", "has format None"),
    ("format = 1", "has no rules"),
    ("format = 1\nrules = 'exact'", "has no rules"),
    ("format = 1\nrules = ['exact']", "rule 1: 'exact' is no rule"),
    ("format = 1\ndefault = 1", "has unknown keys 'default'; there are: format, about, rules"),
    ("format = 1\nabout = 3\n[[rules]]\nrung='exact'", "about is 3"),
    ("format = 1\n[about]\nmodell = 3\n[[rules]]\nrung='exact'", "about has unknown keys 'modell'; there are: title, model"),
    ("format = 1\n[about]\norder = 'zigzag'\n[[rules]]\nrung='exact'", "about: unknown token order 'zigzag'; there are"),
])
def test_a_file_that_is_no_recipe_is_named(file, text, says):
    with pytest.raises(ValueError, match=f"mine.toml.*{says}"):
        Recipe.load(file(text))


def test_no_such_file_is_named(tmp_path):
    for path in (tmp_path / "no.toml", tmp_path, "medium"):
        with pytest.raises(ValueError, match=f"{path}"):
            Recipe.load(path)


@pytest.mark.parametrize("rules, says", [
    ([{"rung": "exact"}, {"layers": "c.*", "rung": "exact"}], "rule 2: layers 'c.\\*' names no attention module; there are: a"),
    ([{"rung": "exact"}, {"heads": [2], "rung": "exact"}], "rule 2: heads 2 are asked of b.attn, which has 2 \\(0 to 1\\)"),
    ([{"layers": "a.*", "rung": "exact"}], "no rule says what b.attn runs with heads 0-1 in steps 0-1"),
    ([{"heads": "1", "rung": "exact"}], "no rule says what a.attn runs with heads 0,2-3 in steps 0-1"),
    ([{"steps": "0.1-1", "rung": "exact"}], "no rule says what a.attn runs with heads 0-3 in steps 0-0.1"),
])
def test_rules_that_do_not_fit_the_model_are_refused(rules, says):
    with pytest.raises(ValueError, match=f"^mine.*{says}"):
        Recipe(rules, source="mine").resolve(Model())


def test_heads_at_the_edge_and_no_model():
    assert Recipe([{"rung": "exact"}, {"heads": [1], "rung": "fp16"}]).resolve(Model()).layers["b.attn"].heads == 2
    with pytest.raises(TypeError, match="neither a pipeline"):
        Recipe([{"rung": "exact"}]).resolve(3)


def test_texts_of_heads_and_steps():
    assert heads_text([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert steps_text(0, 0.05) == "0-0.05" and steps_text(0.00001, 1) == "0.00001-1"
    assert Rule("exact", heads="0-2, 7").heads == (0, 1, 2, 7) and Rule("exact", steps=".1 - 1.0").steps == (0.1, 1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_there_by_name_and_fit_a_model_of_transformer_blocks(name):
    class Blocks(Model):
        def named_modules(self):
            modules = [module for _, module in super().named_modules()[2:]]
            return [(f"transformer_blocks.{number}.attn1", module) for number, module in enumerate(modules)]

    recipe = Recipe.load(name)
    table = recipe.resolve(Blocks())
    first, second = table.layers.values()
    assert recipe.about["title"].startswith(name) and table.has_steps
    assert len(first.spans) == 1 and len(second.spans) == 2 and first.spans[0].rungs[0] == second.spans[0].rungs[0]


@pytest.mark.parametrize("named", ["slow", "no/such.toml"])
def test_no_such_recipe_names_those_there_are(named):
    with pytest.raises(ValueError, match=f"^no such file: {named}; give a recipe's .toml file, .* preset's name: safe, fast$"):
        Recipe.load(named)


def test_python_3_10_reads_toml_too():
    pyproject = read_toml(__file__.partition("/tests/")[0] + "/pyproject.toml")
    assert any(line.startswith("tomli") and "python_version < '3.11'" in line for line in pyproject["project"]["dependencies"])
    assert "tomllib" in sys.modules or sys.version_info < (3, 11)
