"""`clip-jax scale report` as a person meets it: a file, opened in a headless Chromium."""

import re

from playwright.sync_api import expect

from clip_jax.cli.commands import main
from tests.conftest import ROOT
from tests.scaling.conftest import POINTS, write_ladder


def test_a_report_opens_from_a_file_shows_every_run_and_answers_clicks(browser, tmp_path):
    root, file = tmp_path / "<script>alert(1)</script>", tmp_path / "page.html"
    names = write_ladder(root)
    assert main(["scale", "report", str(root), "--output", str(file)]) == 0
    requests, messages = [], []
    page = browser.new_page(viewport={"width": 1240, "height": 900})
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("console", lambda message: messages.append(message.text))
    page.goto(f"file://{file}")

    rows = page.locator("#runs tbody tr")
    assert [row.locator("td").first.inner_text() for row in rows.all()] == sorted(names)
    finished = [x for x in names if not re.search("parent|6.4K", x) or x == "w16@6.4K-seed0"]
    assert page.locator("#points .mark").count() == len(finished)
    assert page.locator("#residuals .mark").count() == len(finished)
    assert page.locator("#points path.law").count() == 1
    assert page.locator("#curves path.curve").count() == len(names) - 1  # one has not begun
    assert page.locator("#curves path.curve.open").count() == 2
    bad = page.locator("#failed tbody tr")
    states = {row.locator("td").nth(1).inner_text() for row in bad.all()}
    assert states == {"failed", "stopped", "not begun"}
    expect(page.locator("#failed")).to_contain_text("clip-jax: step 391: loss nan")
    expect(page.locator("#saved")).to_contain_text("12 runs branch from 4 parent runs")
    expect(page.locator("#summary")).to_contain_text("info_nce: ")
    expect(page.locator("#meaning")).to_contain_text("The law describes")
    expect(page.locator("#cards")).to_contain_text("13 of 16")
    text = page.locator("body").inner_text()
    assert [words for words in ("NaN", "undefined", "Infinity", "[object") if words in text] == []

    run = page.locator("#runs tbody tr", has_text="w32@3.2K-seed1")
    run.click()
    assert page.locator("svg .on").count() == 5  # two points, residual, curve and its end
    other = page.locator("#points .mark:not(.on)").first
    assert other.evaluate("mark => getComputedStyle(mark).opacity") == "0.1"
    run.click()
    assert page.locator("svg .on").count() == 0
    page.locator("#runs th", has_text="pairs").click()
    pairs = page.locator("#runs tbody tr td:nth-child(6)").all_inner_texts()
    assert (pairs[0], pairs[-1]) == ("0", "6.4K")

    page.locator("#points .mark").first.dispatch_event("mousemove", {"clientX": 9, "clientY": 9})
    expect(page.locator("#tip")).to_contain_text("a branch of w16-parent-seed0 at step 80")
    shown = page.locator("#points .mark").count()
    page.get_by_role("button", name="w32").click()
    assert page.locator("#points .mark").count() == shown - 4
    page.get_by_label("which number").select_option("info_nce")
    assert page.locator("#curves path.curve").count() == 0
    assert [url for url in requests if not url.startswith("data:")] == [f"file://{file}"]
    assert messages == []


def test_the_report_of_a_table_shows_its_costs_and_a_law_of_each_model(browser, tmp_path):
    """Without times there is no column for them; without curves and failures, no section."""
    shown = {}
    for table, *options in (
        (ROOT / "notebooks/ladder_digits.csv",),
        (POINTS, "--compare", "upstream_dataset", "--where", "upstream_dataset=LAION*"),
    ):
        file = tmp_path / f"{table.stem}.html"
        assert main(["scale", "report", str(table), "--output", str(file), *options]) == 0
        page = browser.new_page()
        page.goto(f"file://{file}")
        shown[table.stem] = page
    ours, published = shown.values()
    heads = [page.locator("#costs th").all_inner_texts() for page in shown.values()]
    assert heads[0][3:] == ["training FLOPs spent", "time", "share of time in steps"]
    assert heads[1] == heads[0][:4]
    expect(ours.locator("#costs tbody tr").last).to_contain_text("2.9e13")
    expect(ours.locator("#costs tbody tr").last).to_contain_text("37.4 min")
    expect(published.locator("#costs tbody tr").last).to_contain_text("1.7e23")
    expect(published.locator("#warnings .note").first).to_contain_text("not determined: ")
    expect(published.locator("#saved")).to_contain_text("three times those of the forward pass")
    assert ours.locator("#models path.law").count() == 3
    assert ours.locator("#models .mark").count() == 36
    assert published.locator("#models path.law").count() == 9
    assert published.locator("#models svg > text", has_text="ViT-L-14").count() == 3
    assert ours.locator("#validation .mark").count() > 10  # points, averaged over three seeds
    for page, validated in ((ours, ["Validation"]), (published, [])):  # that of one law for all
        headings = page.locator("h2").filter(visible=True).all_inner_texts()
        assert headings == [
            "Points and laws",
            *validated,
            "Laws of each model",
            "Summary of the fit",
            "Costs",
            "Runs",
        ]
    ours.get_by_role("button", name="w24").click()
    assert ours.locator("#models path.law").count() == 2


def test_a_page_without_a_law_says_why_above_its_points(browser, tmp_path):
    table, file = tmp_path / "two.csv", tmp_path / "page.html"
    table.write_text("arch,samples_seen,gmacs_per_sample,top1\na,1e6,1,0.5\nb,1e7,2,0.6\n")
    assert main(["scale", "report", str(table), "--output", str(file)]) == 0
    page = browser.new_page()
    page.goto(f"file://{file}")
    assert page.locator("#points .mark").count() == 2
    expect(page.locator("#warnings .warning")).to_contain_text("no law: 2 points")
