"""PDFs whose pages say which one they are, as the fake engine reads it."""

from pathlib import Path

from fpdf import FPDF

from tests.documents.fake_ocr import SHARE, colour_of

A4, A6 = (210.0, 297.0), (105.0, 148.0)  # mm
LINE = 5.0
WORDS = "page by page the quick brown fox reads what the lazy dog has written, and says so in a line of its own"


def write_pdf(path: Path, pages: int, size: tuple[float, float] = A4) -> Path:
    """Full pages of text with a ruled table at their end. At most 4,000 of them."""
    pdf = FPDF(format=size)
    pdf.set_auto_page_break(False)
    pdf.set_font("Helvetica", size=10)
    for number in range(1, pages + 1):
        pdf.add_page()
        _add_mark(pdf, number)
        _add_text(pdf, number)
    pdf.output(str(path))
    return path


def _add_mark(pdf: FPDF, number: int) -> None:
    side = min(pdf.w, pdf.h) * SHARE
    pdf.set_fill_color(*colour_of(number))
    pdf.rect(0, 0, side, side, style="F")


def _add_text(pdf: FPDF, number: int) -> None:
    letters = int(pdf.w / 2)  # as many as a line has room for
    lines = int(pdf.h / LINE) - 8
    for line in range(lines):
        at = (7 * number + 13 * line) % len(WORDS)
        pdf.text(10, 20 + line * LINE, f"{number}.{line} {(WORDS * 3)[at : at + letters]}"[:letters])
    bottom = 20 + lines * LINE
    for row in range(3):
        pdf.line(10, bottom + row * LINE, pdf.w - 10, bottom + row * LINE)
