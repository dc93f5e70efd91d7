"""What README and card say of the long model's speed and quality is what its files of results hold."""
import json
import re
from pathlib import Path

import numpy as np
import pytest

from lowbit_video import Recipe
from lowbit_video.eval import world

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "examples" / "small_cogvideox" / "long" / "results"
PAGES = {"README": ROOT / "README.md", "card": ROOT / "examples" / "small_cogvideox" / "README.md"}
KINDS = ("striped", "checkered", "cloudy", "shaded", "plain")
ASKED = tuple(f"adherence.{name}" for name in ("colour", "shape", "motion"))
RUNS = {"the reference": "exact", "noise floor": "floor", "cuDNN": "exact (cuDNN)",
        "FlashAttention-4": "exact (FlashAttention-4)", "int8+fp8": "int8+fp8", "int8+fp16": "int8+fp16"}
TEST_SEED = 4000  # of evaluation.py
NUMBER = r"-?\d+(?:\.\d+)?"


def read(name):
    return json.loads((RESULTS / name).read_text())


def plain(page):
    """A page's text, on one line."""
    return " ".join(PAGES[page].read_text(encoding="utf-8").split())


def table_of(page, head, which=1):
    """{first cell: its other cells} of the table whose head begins so, of several the `which`-th."""
    lines = PAGES[page].read_text(encoding="utf-8").split(f"\n| {head} |")[which].splitlines()[2:]
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[first] = cells
    return rows


def same(text, values, digits):
    """The numbers in a cell are these, rounded to so many digits."""
    found = [float(number) for number in re.findall(NUMBER, text)]
    assert found == pytest.approx(values, abs=0.51 * 10**-digits), text


def interval(figure):
    return [figure["value"], figure["low"], figure["high"]]


def run_of(label):
    """Of a row of recipes: "int8+fp8 everywhere", "pooled 0.3 everywhere", "recipe of 0.55x" or a link to a recipe's file."""
    if name := re.match(r"\[(.*?)\]", label):
        return name[1]
    name = label.removesuffix(" everywhere").removeprefix("recipe of ")
    if label.startswith("recipe of "):
        return f"{name}.toml"
    return f"int8+fp8 {name} always 64" if name.startswith("pooled") else name


def test_the_readmes_recipes_are_the_curves():
    curve, timed = read("curve.json"), read("recipe_attention.json")
    rows = table_of("README", f"{curve['about']['captions']} captions, 25 steps, bfloat16, Hilbert order")
    assert {run_of(label) for label in rows} == set(curve["kept"])
    for label, (kept, faster, psnr, by_kind, asked) in rows.items():
        run = run_of(label)
        own = timed["recipes"][run]["ms"] if run in timed["recipes"] else timed["ms"][run]
        same(kept, [100 * curve["kept"][run]], 0)
        same(faster, [timed["ms"]["int8+fp8"] / own], 2)
        same(psnr, interval(curve["rows"][run]["psnr"]), 1)
        same(by_kind, [curve["groups"][kind]["rows"][run]["psnr"]["value"] for kind in KINDS], 1)
        same(asked, [100 * curve["rows"][run][name]["value"] for name in ASKED], 0)


@pytest.mark.parametrize(("page", "head", "digits"), [("README", "run | PSNR, dB | SSIM | LPIPS", 3),
                                                      ("card", "attention | PSNR, dB | SSIM | LPIPS", 4)])
def test_the_exact_kernels_and_precisions_are_the_graphs(page, head, digits):
    rows, told = read("precisions_graph_bfloat16.json")["rows"], table_of(page, head)
    assert len(told) == len(rows)
    for label, cells in told.items():
        run = next(run for name, run in RUNS.items() if name in label.replace("`", ""))
        psnr, ssim, lpips, *asked, seconds, speed_up = cells
        if run != "exact":
            same(psnr, interval(rows[run]["psnr"]), 1)
            same(ssim + " " + lpips, [rows[run]["ssim"]["value"], rows[run]["lpips"]["value"]], digits)
        same(" ".join(asked), [100 * rows[run][name]["value"] for name in ASKED], 0)
        same(seconds, [rows[run]["seconds"]["value"]], 3)
        same(speed_up, interval(rows[run]["speed_up"])[:3 if run.startswith("int8") else 1], 2)


def test_what_the_long_model_gets_right_is_its_evaluation():
    found, card = read("evaluation.json"), table_of("card", "| measured | wanted", which=2)
    steps, guidance = (found["generation"][name] for name in ("num_inference_steps", "guidance_scale"))
    assert (found["captions"], found["dtype"]) == (200, "bfloat16")
    rows = {f"colour, 200 held-out captions, {steps} steps, guidance {guidance:g}, bfloat16": ["colour"], "shape": ["shape"],
            "motion": ["motion"], "background, camera": ["background", "camera"]}
    for row, parts in rows.items():
        same(card[row][0], [100 * found["adherence"][part] for part in parts], 1)
    same(card["autoencoder, 24 held-out clips"][0], [found["vae_psnr_db"]], 1)
    same(re.search(r"of 200 that it never saw (.*?) and all backgrounds", plain("README"))[1],
         [100 * found["adherence"][part] for part in ("colour", "shape", "motion")], 1)
    assert found["adherence"]["background"] == 1
    wanted = {"colour": 0.95, "shape": 0.85, "motion": 0.85, "background": 0.9}
    assert all(found["adherence"][part] >= least for part, least in wanted.items()), "what was wanted"
    assert f"Of the 200 captions {100 * found['adherence']['all']:.0f} % come out right in all." in plain("card")
    chosen = [100 * row["all"] for row in found["sweep"]]
    assert ("{:.1f} % came out all right with guidance 2, {:.1f} % with 2.5 and {:.1f} % with 3.)".format(*chosen)
            in plain("card"))
    assert [row["guidance_scale"] for row in found["sweep"]] == [2, 2.5, 3]


def test_what_the_long_model_misses_is_counted_from_its_evaluation():
    rng = np.random.default_rng(TEST_SEED + 1)
    captions = [world.caption_of(meaning, rng) for meaning in world.draw_meanings(200, TEST_SEED, True, world=world.LONG)]
    misses = read("evaluation.json")["missed"]
    missed = {miss["caption"]: miss["parts"] for miss in misses}
    assert set(missed) <= set(captions)

    def right(part, of):
        """(how many of these captions are right in a part, how many there are)"""
        chosen = [caption for caption in captions if of(world.parse(caption, world.LONG).things)]
        return sum(part not in missed.get(caption, ()) for caption in chosen), len(chosen)

    bounces = right("motion", lambda things: any(thing.motion.startswith("bounce") for thing in things))
    three = right("motion", lambda things: len(things) == 3)
    spins, small = ([right(part, lambda things, of=of: any(map(of, things))) for part in ("shape", "motion")]
                    for of in (lambda thing: thing.motion == "spin", lambda thing: thing.size == "small"))
    in_all, text = sum("motion" in parts for parts in missed.values()), plain("card")
    assert (f"Of the {in_all} captions that miss their motion, {bounces[1] - bounces[0]} have something that bounces "
            f"({bounces[1]} do) and {three[1] - three[0]} have three things ({three[1]} do)") in text
    assert (f"Of the {spins[0][1]} with something that spins {spins[0][0]} have their shapes right and {spins[1][0]} "
            f"their motion, of the {small[0][1]} with something small {small[0][0]} and {small[1][0]}.") in text
    colours = [re.findall(r"(\w+) (?:\w+) \(", miss["seen"]) for miss in misses if "colour" in miss["parts"]]
    torn = sum(len(set(shown)) < len(shown) for shown in colours)
    assert f"Of the {len(colours)} that miss a colour, {torn} show something in two pieces" in text


@pytest.mark.parametrize("page", PAGES)
def test_what_float16_gives_is_its_graphs(page):
    rows, text = read("precisions_graph_float16.json")["rows"], plain(page)
    for run in ("int8+fp8", "int8+fp16"):
        middle, low, high = interval(rows[run]["speed_up"])
        assert re.search(rf"{middle:.2f}x [(\[]{low:.2f}(, |\.\.){high:.2f}[)\]]", text)
        assert re.search(rf"{re.escape(run)}`?[^.]* at {rows[run]['psnr']['value']:.1f}", text)
    assert f"the floor is at {rows['floor']['psnr']['value']:.1f} dB" in text


def test_seconds_are_those_that_were_timed_for_themselves():
    timed = {dtype: read(f"seconds_{dtype}.json") for dtype in ("bfloat16", "float16")}
    told = table_of("card", "attention | bfloat16, seconds")
    assert len(told) == len(timed["float16"]["rows"]) == 6
    for label, cells in told.items():
        run = next(run for name, run in ({"PyTorch": "exact", "this project": "floor"} | RUNS).items() if name in label)
        for dtype, seconds, speed_up in zip(timed, cells[::2], cells[1::2]):
            same(seconds, [timed[dtype]["rows"][run]["seconds"]["value"]], 4)
            same(speed_up, interval(timed[dtype]["rows"][run]["speed_up"]), 3)
    text = plain("README")
    for run in ("int8+fp8", "int8+fp16"):
        for dtype in timed:
            assert "{:.3f}x [{:.3f}, {:.3f}]".format(*interval(timed[dtype]["rows"][run]["speed_up"])) in text
    assert all(record["rows"]["int8+fp8"]["speed_up"]["low"] > 1 for record in timed.values()), "faster than the best exact one"
    every = [*timed.values(), *(read(f"seconds_first_{dtype}.json") for dtype in timed)]
    assert {record["best_exact"] for record in every} == {"exact (FlashAttention-4)"}
    gains = {run: [100 * record["rows"][run]["speed_up"]["value"] - 100 for record in every]
             for run in ("int8+fp8", "int8+fp16")}
    assert "{:.3f} and {:.3f} s for FlashAttention-4's {:.3f} and {:.3f} (".format(
        *(timed[dtype]["rows"][run]["seconds"]["value"] for run in ("int8+fp8", "exact (FlashAttention-4)") for dtype in timed)
    ) in text
    told = "gains [{:.0f} to {:.0f} %](#does-the-video-stay-the-same), and {:.0f} to {:.0f} % at `int8+fp16`."
    assert told.format(*(limit(gains[run]) for run in gains for limit in (min, max))) in text
    assert "by {:.0f} to {:.0f} %: on another".format(min(gains["int8+fp8"]), max(gains["int8+fp8"])) in plain("card")


def test_what_the_long_models_recipes_were_predicted_and_found_to_err_is_told():
    text = " ".join((ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").split())
    for name in ("recipe.toml", "recipe_fast.toml"):
        about = Recipe.load(RESULTS.parent / name).about
        low, high = about["predicted_spread_db"]
        found = "{:.1f}, {:.1f} and {:.1f}".format(*about["found_error_db"])
        own = text.split(f"long/{name})", 1)[1]
        assert re.search(rf"predicted {about['predicted_error_db']:.1f}( dB)?, {low:.1f} to {high:.1f} by caption, "
                         rf"found( on three held-out ones:)? {found}", own[:260]), name
        worse = sum(decibels < low for decibels in about["found_error_db"])
        assert worse in (0, 1), "the text counts them"
        assert ("of which one errs more than the worst that was measured" in own[:260]) == bool(worse), name


def test_what_recipes_take_and_gain_is_told():
    curve, timed = read("curve.json"), read("recipe_attention.json")
    for page, words in (("README", "a call takes {:.2f} ms with `int8+fp8` and {:.2f} with Hopper's exact kernel"),
                        ("card", "a call of its attention takes {:.2f} ms and Hopper's exact kernel {:.2f} (")):
        assert words.format(timed["ms"]["int8+fp8"], timed["ms"]["exact"]) in plain(page)
    taken = [timed["recipes"][f"{name}.toml"]["ms"] / timed["ms"]["int8+fp8"]
             for name in ("recipe", "0.55x", "recipe_fast", "0.33x", "0.25x")]
    text = " ".join((ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").split())
    assert "take {:.2f}, {:.2f}, {:.2f}, {:.2f} and {:.2f} times int8+fp8's time in attention on an H100".format(*taken) in text
    psnr = {run: curve["rows"][run]["psnr"]["value"] for run in curve["kept"]}
    alike = sorted((curve["kept"][run], psnr[run]) for run in psnr if not run.endswith(".toml"))
    gains = [psnr[run] - np.interp(curve["kept"][run], *zip(*alike)) for run in psnr if run.endswith(".toml")]
    assert f"gain {min(gains):.0f} to {max(gains):.0f} dB at the same share" in plain("README")
    shown = {kind: group["rows"]["int8+fp8 pooled 0.3 always 64"]["psnr"]["value"] for kind, group in curve["groups"].items()}
    assert "(30 % kept: {plain:.1f} dB plain, {checkered:.1f} checkered)".format(**shown) in plain("README")
    assert ("with 30 % kept PSNR is {plain:.1f} dB over plain backgrounds, {striped:.1f} over stripes and {checkered:.1f} over "
            "checks.").format(**shown) in plain("card")


def test_what_recipes_lose_to_dense_int8_fp8_is_told():
    below, text = read("curve.json")["below"], plain("README")
    for run, told in (("recipe.toml", "lies "), ("recipe_fast.toml", "")):
        assert f"{run} {told}" + "{:.1f} dB [{:.1f}, {:.1f}]".format(*interval(below[run]["psnr"])) in text
    fewer = "{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * x for x in interval(below["recipe_fast.toml"]["adherence.motion"])))
    assert f"recipe_fast.toml has {fewer} fewer motions right" in text
    assert min(run["psnr"]["value"] for name, run in below.items() if name != "floor") > 3, "None is within 3 dB"


def test_what_falls_out_of_int8_fp8s_adherence_is_told():
    rows, timed = read("curve.json")["rows"], read("recipe_attention.json")
    out = {run for run in rows for name in ASKED if rows[run][name]["value"] < rows["int8+fp8"][name]["low"]}
    assert out == {"0.33x.toml", "0.25x.toml", "int8+fp8 pooled 0.1 always 64"}
    assert "stays in `int8+fp8`'s intervals" in plain("README")
    assert "the recipes of 0.33x and 0.25x and pooling to 0.1 fall out of them." in plain("README")
    told = plain("README").split("Wanted was", 1)[1][:300]
    for name in ("recipe.toml", "recipe_fast.toml"):
        assert f"at {timed['ms']['int8+fp8'] / timed['recipes'][name]['ms']:.2f}" in told


def judged():
    """{(caption, run): its figures} of the page with clips."""
    lines = map(json.loads, (RESULTS.parent / "report" / "results.jsonl").read_text(encoding="utf-8").splitlines())
    return {(line["prompt"], line["run"]): line["figures"] for line in lines if "figures" in line}


def test_the_page_with_clips_is_of_the_table():
    rows, made = read("precisions_graph_bfloat16.json")["rows"], judged()
    first = (RESULTS.parent / "report" / "report.md").read_text(encoding="utf-8")
    for run in ("int8+fp8", "int8+fp16"):
        assert "| `{}` | {:.1f} [{:.1f}, {:.1f}] |".format(run, *interval(rows[run]["psnr"])) in first
    assert "guidance 3" in first and len(made) == 50 * len(rows)
    for run in rows:
        for name in ASKED:
            shares = [figures[name] for (_, own), figures in made.items() if own == run]
            assert np.mean(shares) == pytest.approx(rows[run][name]["value"])
    html = (RESULTS.parent / "report" / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r'id="reel-\d+">', html)) == len(KINDS)
    assert float(re.search(r"differ by up to ([\d.]+) of 255 levels", html)[1]) > 1


def test_what_int8_fp8_loses_caption_by_caption_is_told():
    made = judged()
    captions = sorted({caption for caption, _ in made})

    def changed(run, name):
        """(captions that are no longer right, captions that are for the first time)"""
        before, after = ([made[caption, own][name] for caption in captions] for own in ("exact", run))
        return [{c for c, x, y in zip(captions, before, after) if (x > y, x < y)[won]} for won in (0, 1)]

    lost, won = zip(*(changed("int8+fp8", name) for name in ASKED))
    assert [len(some) for some in lost] == [1, 1, 2] and not any(won)
    assert "loses one colour, one shape and two motions of 50 and wins none here, and `int8+fp16` loses none" in plain("README")
    assert "loses one colour, one shape and two motions and wins none" in plain("card")
    assert not any(changed("int8+fp16", name)[0] for name in ASKED)
    star, triangle = sorted(set.union(*lost))
    assert all(word in star for word in ("cyan star", "purple cross", "orange plain"))
    assert "white triangle is shrinking" in triangle
    own, floor = (made[star, run]["psnr"] for run in ("int8+fp8", "floor"))
    assert f"the clip is {own:.1f} dB from the exact one, the floor's {floor:.1f})" in plain("card")
    tipping = read("near_tipping.json")
    assert list(tipping) == [star, triangle] and all(len(tables) == 4 for tables in tipping.values())
    for caption, tables in tipping.items():
        for run, figures in tables["bfloat16"].items():
            assert figures.items() <= made[caption, run].items()
        theirs = [[tables["paddle"][run][name] for name in ASKED] for run in ("exact", "floor")]
        assert theirs[0] != theirs[1], "Paddle's two exact kernels disagree on each"
    lost = [[tables["float16"][run][name] for tables in tipping.values()] for name in ASKED for run in ("exact", "int8+fp8")]
    assert [sum(before) - sum(after) for before, after in zip(lost[::2], lost[1::2])] == [1, 1, 1], "in float16 one of each"
    assert f"PyTorch's two are {tipping[star]['curve']['floor']['psnr']:.1f} dB apart" in plain("card")


def test_what_paddle_gives_is_told():
    found, text = read("precisions_paddle.json"), plain("card")
    rows = found["rows"]
    psnr = {run: "{:.1f} ({:.1f}..{:.1f})".format(*interval(rows[run]["psnr"])) for run in rows if run != "exact"}
    assert "floor {} dB (".format(psnr["floor"].split()[0]) in text
    for run in ("int8+fp8", "int8+fp16"):
        assert f"{run} {psnr[run]}" in text
    assert "LPIPS {:.4f}, {:.4f} and {:.4f};".format(*(rows[run]["lpips"]["value"] for run in psnr)) in text
    right = ["{:.0f}, {:.0f} and {:.0f} %".format(*(100 * rows[run][name]["value"] for name in ASKED))
             for run in ("exact", "int8+fp8", "int8+fp16")]
    assert "{} with Paddle's attention, {} with int8+fp8 and {} with int8+fp16".format(*right) in text
    apart, here, there = (list(found["beside"][name].values()) for name in ("psnr_db", "floor_db", "floor_there_db"))
    assert f"of five captions lie {np.mean(apart):.1f} dB ({min(apart):.1f} to {max(apart):.1f}) from diffusers'" in text
    assert f"on these five the floor is {np.mean(here):.1f} dB in Paddle and {np.mean(there):.1f} in diffusers" in text
    assert len(apart) == 5 and rows["floor"]["psnr"]["low"] <= np.mean(apart) <= rows["floor"]["psnr"]["high"]
    floor, fp8 = (rows[run]["seconds"] for run in ("floor", "int8+fp8"))
    assert ("Through Paddle `int8+fp8` is at {:.1f} dB and `int8+fp16` at {:.1f}, with the floor at {:.1f} (".format(
        *(rows[run]["psnr"]["value"] for run in ("int8+fp8", "int8+fp16", "floor")))) in plain("README")
    assert ("{:.2f} s ({:.2f}..{:.2f}), int8+fp8 in ".format(*interval(floor))
            + "{:.2f} ({:.2f}..{:.2f}), ".format(*interval(fp8))) in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_seconds_on_another_host_are_told(dtype):
    found = interval(read(f"seconds_first_{dtype}.json")["rows"]["int8+fp8"]["speed_up"])
    assert found[1] > 1
    assert "{:.3f}x [{:.3f}, {:.3f}]".format(*found) in plain("README")
    assert "{:.3f}x ({:.3f}..{:.3f})".format(*found) in plain("card")


def test_all_figures_are_of_one_commit_and_the_models_guidance():
    """What the pages say of every figure at once; a table of other weights would be of an older commit."""
    tables = [read(f"precisions_{name}.json") for name in ("graph_bfloat16", "graph_float16", "paddle")]
    assert {record["generation"]["guidance_scale"] for record in [*tables, read("evaluation.json")]} == {3}
    assert {record["captions"] for record in tables} == {50}
    timed = [read(f"seconds_{name}.json") for name in ("bfloat16", "float16", "first_bfloat16", "first_float16")]
    commits = {record["environment"]["commit"] for record in [*tables, *timed, read("curve.json")["about"]]}
    commits |= {Recipe.load(RESULTS.parent / f"{name}.toml").about["commit"] for name in ("recipe", "recipe_fast")}
    assert len(commits | {read("recipe_attention.json")["about"]["commit"]}) == 1
    told = f"(commit {commits.pop()}, as all"
    assert told in plain("README") and told in plain("card")


def test_no_file_of_results_names_a_place_of_the_machine_that_made_it():
    for path in sorted(RESULTS.glob("*")):
        if path.suffix in (".json", ".md"):
            assert not re.search(r"(?<![\w.])/(tmp|work|home|root)/", path.read_text(encoding="utf-8")), path.name
