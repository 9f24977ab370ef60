"""The report in a browser: it shows, filters, sorts, walks and compares, for everybody, and runs nothing of others."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest

from browser.conftest import Open
from browser.screenshots import take
from made_run import Made, MadeExample, MadeRun, plausible
from spinlm.reporting import html
from spinlm.reporting.comparison import write_comparison
from spinlm.reporting.server import ReportServer
from spinlm.rundir import RunDir


def violations(page: Any) -> list[str]:
    """What axe-core finds that is serious or critical."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python isn't installed")
    page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{violation['id']}: {node['html'][:200]}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def empty_plots(page: Any) -> list[str]:
    """Those in which there is no point, line or area to be seen."""
    return list(
        page.evaluate(
            """() => {
              const isSeen = (path) => getComputedStyle(path).opacity > 0 && path.getTotalLength() > 0;
              const isEmpty = (plot) => ![...plot.querySelectorAll(".role-mark path")].some(isSeen);
              return [...document.querySelectorAll(".plot")].filter(isEmpty).map((plot) => plot.ariaLabel);
            }"""
        )
    )


def shown_ids(page: Any) -> list[str]:
    return [text.strip() for text in page.locator("#list .id").all_text_contents()]


def chosen(page: Any) -> str:
    return str(page.locator("#list [aria-selected=true] .id").text_content()).strip()


class TestShowing:
    @pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (820, "dark"), (1280, "light")])
    def test_everything_is_drawn_and_nothing_is_wider_than_the_window(
        self, visit: Open, report: Path, width: int, scheme: str
    ) -> None:
        page = visit(report, "drawn", viewport={"width": width, "height": 800}, color_scheme=scheme).page
        assert page.locator(".plot").count() == page.locator(".plot svg").count() == 1 + 8 + 6 + 2 + 3
        assert empty_plots(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") == width

    @pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
    def test_accessible(self, visit: Open, report: Path, scheme: str) -> None:
        assert violations(visit(report, "drawn", color_scheme=scheme).page) == []

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_a_comparison(self, visit: Open, comparison: Path, scheme: str) -> None:
        page = visit(comparison, "drawn", color_scheme=scheme, viewport={"width": 390, "height": 800}).page
        assert page.locator(".plot svg").count() == 1 + 8 + 6
        assert empty_plots(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert violations(page) == []

    def test_trainings_of_a_single_row(self, visit: Open, tmp_path: Path) -> None:
        made = plausible(tmp_path / "a", examples=4, iterations=1, words=3, steps=1)
        page = visit(html.write(made.run), "drawn").page
        assert page.locator("#training .plot svg").count() == 6 + 2
        assert empty_plots(page) == []
        other = plausible(tmp_path / "b", examples=4, iterations=1, words=3, steps=1, seed=1)
        assert empty_plots(visit(write_comparison([made.run, other.run], tmp_path / "c.html"), "drawn").page) == []

    def test_a_player_that_has_diverged(self, visit: Open, tmp_path: Path) -> None:
        """Its numbers aren't any: what there is is drawn, and its examples are shown."""
        made = MadeRun(tmp_path / "run", {"iterations": 1}).data([MadeExample(name) for name in "ab"])
        nan = float("nan")
        made.player("base", [Made()] * 2)
        made.player("iteration-0", [Made("of the diverged", real_logprob=nan, logprob=nan, margin=nan)] * 2)
        page = visit(html.write(made.run), "drawn").page
        assert "of the diverged" in page.locator("#detail").inner_text()
        assert "real response not finite nats a token · margin not finite" in page.locator("#detail").inner_text()
        assert not [words for words in empty_plots(page) if "nan" not in words]
        assert page.locator("#list .chip").count() == 0

    def test_a_running_run(self, visit: Open, running: MadeRun) -> None:
        assert violations(visit(running.path / "report.html", "drawn").page) == []

    def test_a_run_of_only_data(self, visit: Open, tmp_path: Path) -> None:
        made = MadeRun(tmp_path / "run").data([MadeExample("a", "the question", "the answer")])
        page = visit(html.write(made.run)).page
        assert "the answer" in page.locator("#detail").inner_text()
        assert page.locator(".controls").is_hidden()

    def test_without_scripts_the_numbers_are_there(self, visit: Open, report: Path) -> None:
        page = visit(report, "", java_script_enabled=False).page
        assert "better than sft" in page.locator("#headline").inner_text()
        assert page.locator("main > .scroll table").is_visible()
        assert "need it" in page.locator("noscript").inner_text()

    def test_a_chart_says_in_words_what_it_shows(self, visit: Open, report: Path) -> None:
        chart = visit(report).page.get_by_role("img", name="Real NLL a token: base: ")
        assert chart.count() == 1

    def test_every_iteration_of_many_has_its_place_on_the_axis(self, visit: Open, tmp_path: Path) -> None:
        made = MadeRun(tmp_path / "run", {"iterations": 14}).data([MadeExample("a")])
        for player in ("base", *(f"iteration-{t}" for t in range(14))):
            made.player(player, [Made()])
        page = visit(html.write(made.run), "drawn").page
        labels = page.locator("#curves .plot").first.locator(".role-axis-label text")
        shown = [
            label.text_content()
            for label in labels.all()
            if label.evaluate("(node) => getComputedStyle(node).opacity") != "0"
        ]
        assert ["start", *map(str, range(14))] == shown[:15]

    def test_the_differences_stay_within_the_frame(self, visit: Open, tmp_path: Path) -> None:
        """Of a difference of -0.5 everywhere, where an axis would end."""
        made = MadeRun(tmp_path / "run").data([MadeExample(name, tokens=10) for name in "ab"])
        made.player("base", [Made(real_logprob=-10.0)] * 2).player("iteration-0", [Made(real_logprob=-5.0)] * 2)
        plot = visit(html.write(made.run), "drawn").page.locator(".plot").first
        ends = "(box) => [box.getBoundingClientRect().left, box.getBoundingClientRect().right]"
        frame = plot.locator(".root .background").first.evaluate(ends)
        bars = [bar.evaluate(ends) for bar in plot.locator(".mark-rule.role-mark line").all()]
        left, right = min(left for left, _ in bars) - frame[0], frame[1] - max(right for _, right in bars)
        assert left >= 4
        assert right >= 4

    def test_a_tooltip(self, visit: Open, report: Path) -> None:
        page = visit(report, "drawn").page
        page.locator("#curves .plot").first.locator("path[transform]").last.hover()
        assert page.locator("#vg-tooltip-element").inner_text().startswith("player\titeration-")

    def test_the_theme_can_be_turned_and_stays_so(self, visit: Open, report: Path) -> None:
        page = visit(report, color_scheme="light").page
        colour = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(colour)
        page.get_by_role("button", name="Dark theme").click()
        dark = page.evaluate(colour)
        page.reload()
        assert light != dark == page.evaluate(colour)
        assert page.get_by_role("button", name="Light theme").is_visible()

    def test_printed(self, visit: Open, report: Path) -> None:
        page = visit(report, "drawn", color_scheme="dark").page
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        for selector in ("nav", "#theme", ".controls", "#list"):
            assert page.locator(selector).is_hidden()
        for selector in ("#headline", "main > .scroll table", ".plot >> nth=0", ".response >> nth=0"):
            assert page.locator(selector).is_visible()

    def test_a_command_to_copy(self, visit: Open, report: Path) -> None:
        page = visit(report, permissions=["clipboard-read", "clipboard-write"]).page
        page.get_by_role("button", name="Copy").click()
        assert page.evaluate("navigator.clipboard.readText()") == f"spinlm export {report.parent} OUT --merge"


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six examples with a verifier. From sft to iteration-0, b and f are gained and c is lost."""
    made = MadeRun(tmp_path_factory.mktemp("verified") / "run", {"sft": {}, "iterations": 1})
    made.data([MadeExample(name, f"question {name}", "one two three") for name in "abcdef"])
    made.player("base", [Made("base", False)] * 6)
    made.player("sft", [_judged(right) for right in (True, False, True, False, False, False)])
    tokens, margins = (3, 9, 5, 7, 2, 4), (0.5, -1.0, 2.0, 0.1, 0.0, 1.0)
    rights, cut = (True, True, False, False, False, True), (False, False, True, False, False, False)
    made.player(
        "iteration-0",
        [
            Made("one two three" if right else "one 2 three", right, -10.0, count, is_cut, margin, "greedy", not right)
            for right, count, is_cut, margin in zip(rights, tokens, cut, margins, strict=True)
        ],
    )
    return html.write(made.run)


def _judged(right: bool) -> Made:
    return Made("of sft", right, greedy="greedy", greedy_right=right)


class TestFiltering:
    def test_by_what_became_of_them(self, visit: Open, verified: Path) -> None:
        page = visit(verified).page
        for shown, ids in (
            ("all", "abcdef"),
            ("gained: right more often", "bf"),
            ("lost: right less often", "c"),
            ("right", "abf"),
            ("wrong", "cde"),
            ("cut at the cap", "c"),
            ("equal to the real response", "abf"),
        ):
            page.locator("#filter").select_option(label=shown)
            assert shown_ids(page) == list(ids), shown
            assert page.locator("#count").inner_text() == f"{len(ids)} of 6 examples"
            assert chosen(page) in ids

    def test_between_other_players(self, visit: Open, verified: Path) -> None:
        page = visit(verified).page
        page.locator("#from").select_option("base")
        page.locator("#to").select_option("sft")
        page.locator("#filter").select_option("gained")
        assert shown_ids(page) == ["a", "c"]
        page.locator("#filter").select_option("lost")
        assert shown_ids(page) == []
        assert page.locator("#detail").inner_text() == ""

    def test_without_a_verifier_by_how_likely_the_real_response_is(self, visit: Open, tmp_path: Path) -> None:
        made = MadeRun(tmp_path / "run").data([MadeExample(name, tokens=10) for name in "abc"])
        made.player("base", [Made(real_logprob=-10.0)] * 3)
        made.player("iteration-0", [Made(real_logprob=value) for value in (-8.0, -12.0, -10.0)])
        page = visit(html.write(made.run)).page
        page.locator("#filter").select_option(label="gained: the real response is likelier")
        assert shown_ids(page) == ["a"]
        page.locator("#filter").select_option(label="lost: the real response is less likely")
        assert shown_ids(page) == ["b"]

    def test_an_example_without_a_verifier_is_neither_gained_nor_lost(self, visit: Open, tmp_path: Path) -> None:
        made = MadeRun(tmp_path / "run").data([MadeExample(name) for name in "abcd"])
        before = Made("s", None, -90.0, greedy="g")
        made.player("base", [before, _judged(False), _judged(True), before])
        after = Made("s", None, -1.0, greedy="g")
        made.player("iteration-0", [after, _judged(True), _judged(False), after])
        page = visit(html.write(made.run)).page
        for kind in ("sampled", "greedy"):
            page.locator("#kind").select_option(kind)
            for shown, ids in (("gained", "b"), ("lost", "c"), ("right", "b"), ("wrong", "c"), ("all", "abcd")):
                page.locator("#filter").select_option(shown)
                assert shown_ids(page) == list(ids), (kind, shown)
            for order, ids in (("gain", "bcad"), ("loss", "cbad"), ("data", "abcd")):
                page.locator("#sort").select_option(order)
                assert shown_ids(page) == list(ids), (kind, order)

    def test_only_the_two_that_are_compared(self, visit: Open, verified: Path) -> None:
        page = visit(verified).page
        cards = page.locator(".response h4")
        assert cards.all_inner_texts() == ["real response", "base", "sft", "iteration-0"]
        assert page.locator(".is-compared h4").all_inner_texts() == ["sft", "iteration-0"]
        assert page.locator(".is-compared header").all_inner_texts() == [
            "sft\nfrom\n✓ right", "iteration-0\nto\n✓ right",
        ]  # fmt: skip
        page.locator("#who").select_option(label="only from and to")
        assert cards.all_inner_texts() == ["real response", "sft", "iteration-0"]
        page.locator("#from").select_option("base")
        assert cards.all_inner_texts() == ["real response", "base", "iteration-0"]

    def test_search_is_in_all_texts(self, visit: Open, verified: Path) -> None:
        page = visit(verified).page
        for wanted, ids in (("QUESTION D", "d"), ("one 2", "cde"), ("of sft", "abcdef"), ("nowhere", "")):
            page.locator("#search").fill(wanted)
            assert shown_ids(page) == list(ids)

    def test_sorting(self, visit: Open, verified: Path) -> None:
        page = visit(verified).page
        for order, ids in (
            ("longest response", "bdcfae"),
            ("largest margin", "cfadeb"),
            ("smallest margin", "bedafc"),
            ("largest gain", "bfadec"),
            ("largest loss", "cadebf"),
            ("their order in the data", "abcdef"),
        ):
            page.locator("#sort").select_option(label=order)
            assert shown_ids(page) == list(ids), order

    def test_who_has_no_margin_comes_last_either_way(self, visit: Open, verified: Path) -> None:
        page = visit(verified).page
        page.locator("#to").select_option("sft")
        for order in ("margin", "smallest"):
            page.locator("#sort").select_option(order)
            assert shown_ids(page) == list("abcdef")

    def test_gained_and_lost_are_marked_in_the_list(self, visit: Open, verified: Path) -> None:
        page = visit(verified).page
        chips = [item.split("\n")[-1] for item in page.locator("#list li").all_inner_texts()]
        assert [chip for chip in chips if "gained" in chip or "lost" in chip] == [
            "b ▲ gained", "c ▼ lost", "f ▲ gained",
        ]  # fmt: skip

    def test_the_list_shows_what_tells_prompts_apart(self, visit: Open, tmp_path: Path) -> None:
        """Not what all begin with; but an only prompt, or one that is no more than that, from its beginning."""
        for prompts, lines in (
            (["Reverse: one two\nNow.", "Reverse: one three", "Reverse: four"], ["… one two", "… one three", "… four"]),
            (["Say a", "Sing b"], ["Say a", "Sing b"]),
            (["Only one here"], ["Only one here"]),
            (["Go on", "Go on"], ["… on", "… on"]),
            (["same", "same"], ["same", "same"]),
        ):
            path = tmp_path / str(len(list(tmp_path.iterdir())))
            made = MadeRun(path).data([MadeExample(str(n), prompt) for n, prompt in enumerate(prompts)])
            page = visit(html.write(made.run)).page
            assert page.locator("#list .line").all_text_contents() == lines


class TestGreedy:
    def test_where_not_everybody_gave_one_there_is_no_choice(self, visit: Open, verified: Path) -> None:
        assert visit(verified).page.locator("#kind option").all_text_contents() == ["sampled"]

    def test_they_are_judged_by_themselves(self, visit: Open, tmp_path: Path) -> None:
        made = MadeRun(tmp_path / "run").data([MadeExample(name) for name in "ab"])
        made.player("base", [Made("s", True, greedy="base greedily", greedy_right=False)] * 2)
        made.player("iteration-0", [Made("s", True, greedy="g", greedy_right=right) for right in (True, False)])
        page = visit(html.write(made.run)).page
        page.locator("#filter").select_option("gained")
        assert shown_ids(page) == []
        page.locator("#kind").select_option("greedy")
        assert shown_ids(page) == ["a"]
        assert "base greedily" in page.locator("#detail").inner_text()


class TestKeyboard:
    def test_walking_the_list(self, visit: Open, verified: Path) -> None:
        page = visit(verified).page
        page.locator("#list").focus()
        for key, expected in (
            ("j", "b"), ("ArrowDown", "c"), ("k", "b"), ("ArrowUp", "a"), ("ArrowUp", "a"), ("End", "f"), ("j", "f"),
            ("PageUp", "a"), ("PageDown", "f"), ("Home", "a"),
        ):  # fmt: skip
            page.keyboard.press(key)
            assert chosen(page) == expected, key
            assert page.locator("#list").get_attribute("aria-activedescendant") == f"example-{'abcdef'.index(expected)}"
            assert f"{expected} – " in page.locator("#detail h3").inner_text()

    def test_into_the_responses_and_on(self, visit: Open, verified: Path) -> None:
        page = visit(verified).page
        page.locator("#list").focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "detail"
        page.keyboard.press("j")
        assert chosen(page) == "b"

    def test_keys_that_are_typed_are_not_taken(self, visit: Open, verified: Path) -> None:
        page = visit(verified).page
        page.locator("#search").press_sequentially("jk")
        assert page.locator("#search").input_value() == "jk"
        page.locator("#search").fill("")
        page.locator("#list").focus()
        page.keyboard.press("Control+j")
        assert chosen(page) == "a"

    def test_previous_and_next_keep_the_focus(self, visit: Open, verified: Path) -> None:
        page = visit(verified).page
        page.get_by_role("button", name="Next").focus()
        page.keyboard.press("Enter")
        page.keyboard.press("Enter")
        assert chosen(page) == "c"
        assert page.evaluate("document.activeElement.textContent") == "Next"
        assert page.get_by_role("button", name="Previous").is_enabled()

    def test_everything_is_reached_by_tab_and_the_focus_is_seen(self, visit: Open, verified: Path) -> None:
        page = visit(verified).page
        reached = []
        while not reached or reached[-1] != "list":
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate("document.activeElement.id || document.activeElement.textContent.trim().slice(0, 20)")
            )
            width = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
            assert page.evaluate("document.activeElement === document.body") or width == "3px", reached[-1]
        assert reached[0] == "Skip to the verdict"
        controls = ["filter", "from", "to", "sort", "kind", "who", "against", "search", "list"]
        assert [name for name in reached if name in controls] == controls
        assert "theme" in reached


class TestDifferences:
    @pytest.fixture
    def page(self, visit: Open, tmp_path: Path) -> Any:
        made = MadeRun(tmp_path / "run", {"iterations": 1})
        made.data([MadeExample("a", "q", "the quick brown fox jumps"), MadeExample("b", "q", "我喜欢猫")])
        made.player("base", [Made("the slow brown dog jumps high"), Made("我喜欢狗")])
        made.player("iteration-0", [Made("the quick brown dog jumps"), Made("我喜欢猫")])
        return visit(html.write(made.run)).page

    def marked(self, page: Any) -> list[list[str]]:
        cards = page.locator(".response").all()
        return [card.locator("mark").all_text_contents() for card in cards]

    def test_from_the_real_response(self, page: Any) -> None:
        assert self.marked(page) == [[], ["slow", "dog", "high"], ["dog"]]

    def test_from_the_player_before(self, page: Any) -> None:
        page.locator("#against").select_option("before")
        assert self.marked(page) == [[], ["slow", "dog", "high"], ["quick"]]

    def test_from_nothing(self, page: Any) -> None:
        page.locator("#against").select_option("nothing")
        assert self.marked(page) == [[], [], []]

    def test_without_blanks_between_words(self, page: Any) -> None:
        page.locator("#list").focus()
        page.keyboard.press("j")
        assert self.marked(page) == [[], ["狗"], []]

    def test_by_an_independent_implementation(self, page: Any) -> None:
        """As many tokens are kept as the textbook's recursion finds, and the kept ones are in both, in this order."""
        import random

        draw = random.Random(5)
        for _ in range(60):
            mine, theirs = ([draw.choice("abcd") for _ in range(draw.randrange(12))] for _ in range(2))
            differs = page.evaluate("([mine, theirs]) => differing(mine, theirs)", [mine, theirs])
            kept = [token for token, is_new in zip(mine, differs, strict=True) if not is_new]
            assert len(kept) == _longest_common_subsequence(mine, theirs)
            rest = iter(theirs)
            assert all(token in rest for token in kept)

    def test_long_texts_that_differ_at_both_ends(self, page: Any) -> None:
        """Neither beginning nor end is common, and a table of all pairs of their tokens would have 49 million cells."""
        middle = " ".join(f"word{n % 97}" for n in range(3500))
        differs = page.evaluate(
            "([mine, theirs]) => differing(tokensOf(mine), tokensOf(theirs))",
            [f"one {middle} two", f"three {middle} four"],
        )
        assert [place for place, is_new in enumerate(differs) if is_new] == [0, len(differs) - 1]

    def test_a_short_text_and_a_long_one(self, page: Any) -> None:
        differs = page.evaluate("differing(['x', 'y'], ['a', ...Array(9000).fill('b'), 'y', 'c'])")
        assert differs == [True, False]

    def test_texts_that_have_nothing_in_common_are_not_marked_from_end_to_end(
        self, visit: Open, tmp_path: Path
    ) -> None:
        made = MadeRun(tmp_path / "run").data([MadeExample("a", real="狗" * 9000)])
        made.player("base", [Made("猫" * 9000)]).player("iteration-0", [Made("猫" * 8999 + "狗")])
        page = visit(html.write(made.run)).page
        assert page.locator(".response mark").count() == 0
        assert page.locator(".facts-line").all_inner_texts()[1].endswith("differs too much to be marked")
        page.locator("#against").select_option("before")
        assert self.marked(page) == [[], [], ["狗"]]

    def test_what_is_joined_stays_together(self, visit: Open, tmp_path: Path) -> None:
        """And other ends of lines are no difference."""
        made = MadeRun(tmp_path / "run").data([MadeExample("a", real="he is 👩\u200d🚀\nمی\u200cخواهم")])
        made.player("base", [Made("he is 👩\u200d🔬\r\nمی\u200cخواند")])
        page = visit(html.write(made.run)).page
        assert self.marked(page) == [[], ["👩\u200d🔬\nمی\u200cخواند"]]
        assert page.locator(".unseen").count() == 0


def _longest_common_subsequence(mine: list[str], theirs: list[str]) -> int:
    row = [0] * (len(theirs) + 1)
    for a in mine:
        before = row[:]
        for place, b in enumerate(theirs):
            row[place + 1] = before[place] + 1 if a == b else max(row[place], before[place + 1])
    return row[-1]


HOSTILE = [
    "<script>window.__pwned = 1</script>",
    "</script><script>window.__pwned = 1</script>",
    "<img src=x onerror='window.__pwned = 1'>",
    "<svg onload='window.__pwned = 1'><a href='javascript:window.__pwned=1'>x</a></svg>",
    "javascript:window.__pwned=1",
    "{{ window.__pwned = 1 }} ${window.__pwned = 1} {% raw %} [[${7*7}]]",
    "--><!-- <![CDATA[ ]]> </textarea></title></style></noscript><iframe srcdoc='<script>parent.__pwned=1</script>'>",
    "'\"><details open ontoggle=window.__pwned=1>",
    "datum.constructor.constructor('window.__pwned=1')()",
]


class TestHostileTexts:
    @pytest.fixture(scope="class")
    def hostile(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """All that others wrote is hostile: the dataset, the responses, the recipe, diagnostics, the run's name."""
        place = tmp_path_factory.mktemp("hostile") / "run<img src=x onerror=window.__pwned=1>\u202e"
        sections = {
            "model": {"name": HOSTILE[1]},
            "data": {"source": HOSTILE[2]},
            "prompt": {"template": "{prompt}" + HOSTILE[0]},
        }
        made = MadeRun(place, {**sections, "iterations": 1})
        made.data([MadeExample(f"{text}{n}", text, text) for n, text in enumerate(HOSTILE)])
        for player in ("base", "iteration-0"):
            made.player(player, [Made(f"{player} {text}", right=player != "base") for text in HOSTILE])
        made.training("iteration-0", [{"step": 1, "loss": 0.6}])
        made.diagnostics(
            0, {HOSTILE[0]: 1.0}, dict.fromkeys(("name", "title", "message", "cause", "remedy"), HOSTILE[2])
        )
        made.stopped(1, HOSTILE[1])
        return html.write(made.run)

    def test_nothing_of_it_runs_and_all_of_it_is_text(self, visit: Open, hostile: Path) -> None:
        page = visit(hostile, "drawn").page
        texts = set()
        page.locator("#list").focus()
        for _ in HOSTILE:
            texts.add(page.locator(".prompt").text_content())
            assert page.locator(".response .text").first.text_content() == page.locator(".prompt").text_content()
            page.keyboard.press("j")
        assert texts == set(HOSTILE)
        page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
        page.mouse.wheel(0, 20_000)
        assert page.evaluate("window.__pwned") is None
        assert page.locator("img:not([role]), iframe, object, embed, svg a").count() == 0
        assert page.locator("script").count() == 2 + page.locator("script[type]").count()

    def test_of_a_comparison_too(self, visit: Open, hostile: Path, tmp_path: Path) -> None:
        other = plausible(tmp_path / HOSTILE[2].replace("/", "-"), examples=9, iterations=1, words=3, steps=2)
        page = visit(write_comparison([RunDir(hostile.parent), other.run], tmp_path / "c.html")).page
        assert page.evaluate("window.__pwned") is None
        assert page.locator("img:not([role])").count() == 0

    def test_what_can_not_be_seen_is_shown(self, visit: Open, tmp_path: Path) -> None:
        text = "a\x00b\x1b[31mred\u202egnp.exe\u200b\ufeff\u2066x\u2069\U000e0041\ttab\nline"
        made = MadeRun(tmp_path / "run").data(
            [MadeExample("a", text, text), MadeExample("b", "\ud800 and \udfff", "x")]
        )
        page = visit(html.write(made.run)).page
        expected = "aU+0000bU+001B[31mredU+202Egnp.exeU+200BU+FEFFU+2066xU+2069U+E0041\ttab\nline"
        assert page.locator(".prompt").text_content() == expected
        assert page.locator(".prompt .unseen").count() == 8
        page.locator("#list").focus()
        page.keyboard.press("j")
        assert page.locator(".prompt").text_content() == "U+D800 and U+DFFF"

    def test_a_text_that_reads_from_right_to_left_turns_nothing_around_it(self, visit: Open, tmp_path: Path) -> None:
        made = MadeRun(tmp_path / "run").data([MadeExample("a", "مرحبا بالعالم", "x")])
        page = visit(html.write(made.run)).page
        style = page.locator(".prompt").evaluate(
            "(node) => [getComputedStyle(node).direction, getComputedStyle(node).unicodeBidi]"
        )
        assert style == ["rtl", "isolate"]

    def test_a_text_of_a_megabyte(self, visit: Open, tmp_path: Path) -> None:
        made = MadeRun(tmp_path / "run").data([MadeExample("a", "word " * 200_000, "real " * 200_000)])
        made.player("base", [Made("base " * 200_000)]).player("iteration-0", [Made("real " * 199_999 + "unreal ")])
        page = visit(html.write(made.run)).page
        assert len(page.locator(".prompt").text_content()) < 21_000
        assert "more characters are in the run directory" in page.locator(".prompt").text_content()
        assert all(len(text) < 21_000 for text in page.locator(".response .text").all_text_contents())
        assert page.locator(".response mark").count() < 10
        assert "differs too much to be marked" in page.locator(".facts-line").nth(1).inner_text()
        assert "differs" not in page.locator(".facts-line").nth(2).inner_text()


def until_it_reloads(page: Any) -> None:
    """Let its clock run, a second at a time, until it is another page."""
    sync_api = pytest.importorskip("playwright.sync_api")
    page.evaluate("window.__before = true")
    for _ in range(90):
        page.clock.run_for(1_000)
        with contextlib.suppress(sync_api.Error):  # asked while it reloads
            if page.evaluate("window.__before") is None:
                page.wait_for_selector("body[data-drawn]", state="attached")
                return
    raise AssertionError("it hasn't reloaded in a minute and a half")


class TestReloading:
    def test_it_keeps_the_place_the_filter_and_the_example(self, visit: Open, running: MadeRun) -> None:
        html.write(running.run, running=True)
        page = visit(running.path / "report.html", "drawn", clock=True).page
        page.locator("#sort").select_option("longest")
        page.locator("#search").fill("words")
        page.locator("#list").focus()
        page.keyboard.press("j")
        page.evaluate("document.querySelector('#run details').open = true")
        at, example = page.evaluate("scrollY"), chosen(page)
        assert at > 0
        running.took("data", 1.0)
        html.write(running.run, running=True)
        until_it_reloads(page)
        assert page.locator("#run details").first.get_attribute("open") is not None
        assert page.locator("#sort").input_value() == "longest"
        assert page.locator("#search").input_value() == "words"
        assert chosen(page) == example
        assert page.evaluate("document.activeElement.id") == "list"
        assert page.evaluate("scrollY") == at

    @pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
    def test_a_page_that_is_served(self, visit: Open, tmp_path: Path, host: str) -> None:
        """Also under a token."""
        made = plausible(tmp_path / "demo", examples=3, iterations=1, words=6, steps=3)
        with ReportServer(made.run, host, 0) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            page = visit(f"http://127.0.0.1:{server.port}{server.path}", "drawn", clock=True).page
            assert "benchmark mine" not in page.locator("#run").text_content()
            made.took("benchmarks/mine/base", 1.0)
            until_it_reloads(page)
            assert "benchmark mine" in page.locator("#run").text_content()
            server.shutdown()

    def test_not_while_it_is_paused_or_in_use(self, visit: Open, running: MadeRun) -> None:
        page = visit(running.path / "report.html", clock=True).page
        page.evaluate("window.__stayed = true")
        page.locator("#search").focus()
        for _ in range(6):
            page.clock.run_for(9_000)
            page.keyboard.press("a")
        page.evaluate("getSelection().selectAllChildren(document.getElementById('headline'))")
        page.clock.run_for(40_000)
        page.get_by_role("button", name="Pause reloading").click()
        page.evaluate("getSelection().removeAllRanges()")
        page.clock.run_for(40_000)
        assert page.evaluate("window.__stayed") is True
        page.reload()
        assert page.get_by_role("button", name="Go on reloading").get_attribute("aria-pressed") == "true"
        page.get_by_role("button", name="Go on reloading").click()
        until_it_reloads(page)

    def test_a_page_that_was_left_behind_says_so(self, visit: Open, running: MadeRun) -> None:
        page = visit(running.path / "report.html").page
        assert page.locator("#stale").inner_text() == ""
        later = page.context.new_page()
        later.clock.install()
        later.clock.fast_forward("03:00:00")
        later.goto((running.path / "report.html").as_uri())
        assert "180 minutes ago: whether it still runs, spinlm status says" in later.locator("#stale").inner_text()

    def test_a_finished_page_stays(self, visit: Open, report: Path) -> None:
        page = visit(report, clock=True).page
        page.evaluate("window.__stayed = true")
        page.clock.run_for(120_000)
        assert page.evaluate("window.__stayed") is True


class TestPacked:
    @pytest.fixture(scope="class")
    def packed(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("spinlm.reporting.browser.PLAIN_BYTES", 0)
            made = plausible(tmp_path_factory.mktemp("packed") / "run", examples=12, iterations=1, words=6, steps=3)
            return html.write(made.run)

    def test_it_is_unpacked(self, visit: Open, packed: Path) -> None:
        page = visit(packed).page
        assert 'data-encoding="gzip"' in packed.read_text(encoding="utf-8")
        assert page.locator("#count").inner_text() == "12 of 12 examples"

    def test_a_browser_that_can_not_unpack_says_so(self, visit: Open, packed: Path) -> None:
        page = visit(packed).page
        page.add_init_script("delete window.DecompressionStream")
        page.reload()
        page.wait_for_selector("body[data-drawn]", state="attached")
        assert "can't be shown by this browser" in page.locator("#examples-failed").inner_text()
        assert page.locator(".plot svg").count() == page.locator(".plot").count()


@pytest.mark.slow
def test_screenshots(chromium: Any, report: Path, tmp_path: Path) -> None:
    sizes = {}
    for path in take(chromium, report, tmp_path / "images"):
        header = path.read_bytes()[:24]
        sizes[path.name] = (int.from_bytes(header[16:20]), int.from_bytes(header[20:24]))
        assert header.startswith(b"\x89PNG")
    assert sizes == {
        "report-1280.png": (1280, 900),
        "report-1280-dark.png": (1280, 900),
        "report-820.png": (820, 1000),
        "report-390.png": (390, 844),
        "examples-1280.png": (1280, 760),
    }
