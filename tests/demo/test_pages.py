"""The pages that the OCR model is trained on and tested with."""

from dataclasses import replace

import pytest
from PIL import ImageChops

from demo.training import pages

TEXTS = ["# Offline", "No cable goes out.", "It runs anyway.", "", "Ports: 8000, 8001!", "# 2", "x"]


def test_what_it_says() -> None:
    page = pages.written(TEXTS)
    assert page.markdown == "# Offline\n\nNo cable goes out.\nIt runs anyway.\n\nPorts: 8000, 8001!\n\n# 2\n\nx"


@pytest.mark.parametrize("pixels", [(512, 512), (700, 900), (400, 480)])
def test_each_letter_is_drawn_where_the_page_says(pixels: tuple[int, int]) -> None:
    text = "iiHlM|Wiiillll" * 3
    page = pages.written([text], size=17, look=pages.Look(pixels=pixels))
    (line,) = page.lines
    image = page.draw().resize((pages.SIDE, pages.SIDE))
    whole = image.crop((0, round(line.top), pages.SIDE, round(line.top + 1.3 * line.size)))
    columns = [max(ImageChops.invert(whole.crop((x, 0, x + 1, whole.height))).tobytes()) for x in range(whole.width)]
    for letter, center in zip(text, line.words[0].centers, strict=True):
        if letter in "il|":  # a stroke in its middle, paper at its sides
            at = int(center)
            assert max(columns[at - 1 : at + 2]) > 150, (letter, center)
    left, _, right, _ = ImageChops.invert(whole).getbbox() or (0, 0, 0, 0)
    assert (left, right) == pytest.approx((line.words[0].centers[0], line.words[0].centers[-1]), abs=6)


@pytest.mark.parametrize("seed", range(400))
def test_random_pages_keep_to_their_style(seed: int) -> None:
    page = pages.drawn_at_random(seed)
    assert page == pages.drawn_at_random(seed)
    assert 1 <= len(page.lines) <= pages.LINES + 1
    for line, below in zip(page.lines, page.lines[1:], strict=False):
        assert below.top - line.top > line.size, "lines overlap"
    for line in page.lines:
        assert line.text == " ".join(line.text.split())
        assert set(line.text) <= {*pages.LETTERS, " "}
        assert line.left >= pages.MARGIN
        assert max(line.words[-1].centers) <= pages.SIDE - pages.MARGIN
        assert line.top + line.size <= pages.SIDE
    # What stands on it is inside of it: nothing but paper at its edges.
    quiet = pages.Page(page.lines, replace(page.look, paper=255, ink=0, noise=0.0)).draw()
    edge = ImageChops.invert(quiet)
    pixels = quiet.width / pages.SIDE
    edge.paste(0, (round((pages.MARGIN - 4) * pixels), 0, round((pages.SIDE - 3) * pixels), quiet.height))
    assert edge.getbbox() is None


def test_nonsense_has_every_letter() -> None:
    text = "".join(pages.drawn_at_random(seed).markdown for seed in range(60))
    assert set(pages.LETTERS) <= set(text)
