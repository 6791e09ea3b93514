"""The report, of a real Prometheus: for people, who may have given things any name."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lxml import etree, html  # type: ignore[import-untyped]
from PIL import Image, ImageColor

from tests.conftest import API_KEY, CHECKOUT, free_port
from tests.monitoring.conftest import Scene
from vllm_unified.monitoring.charts import DASHBOARDS, Colour
from vllm_unified.monitoring.drawing import PALETTE
from vllm_unified.monitoring.history import history
from vllm_unified.monitoring.prometheus import Prometheus, Span
from vllm_unified.monitoring.report import page, picture
from vllm_unified.monitoring.units import shown


def report(scene: Scene, *options: str, url: str | None = None) -> "subprocess.CompletedProcess[bytes]":
    environ = {**os.environ, "VLLM_UNIFIED_HOME": str(scene.home), "VLLM_API_KEY": API_KEY}
    command = [sys.executable, "-m", "vllm_unified", "report", "--prometheus", url or scene.url, *options]
    return subprocess.run(command, env=environ, cwd=CHECKOUT, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def document(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> etree._Element:
    file = tmp_path_factory.mktemp("page") / "page.html"
    done = report(scene, "--hours", "0.1", "--output", str(file))
    assert (done.returncode, done.stdout.decode()) == (0, f"wrote {file}\n"), done.stderr
    return html.document_fromstring(file.read_text(encoding="utf-8"))


def test_each_model_comes_first(document: etree._Element) -> None:
    table = document.find(".//table")
    cells = [[cell.text_content() for cell in row] for row in table]
    assert cells[0][:4] == ["model", "State", "Ready", "Requests"]
    of_chat = next(row for row in cells if row[0] == "chat")
    assert of_chat[1:3] == ["ready", "100 %"]
    assert "–" not in of_chat
    assert [heading.text_content() for heading in document.iter("h2")][:3] == ["Models", "Alerts", "Overview"]


def test_alerts_that_fired(document: etree._Element) -> None:
    rows = [[cell.text_content() for cell in row] for row in document.findall(".//table")[1]]
    assert rows[0] == ["alert", "of", "severity", "from", "to", "for"]
    always = next(row for row in rows if row[0] == "Always")
    assert always[2] == "warning"
    assert always[4] == "still firing"


def test_every_dashboard_and_each_model_has_charts(document: etree._Element) -> None:
    titles = {heading.text_content() for heading in document.iter("h2")}
    assert {each.title for each in DASHBOARDS if not each.of_one_model} <= titles
    of_models = {each.find("summary").text_content(): each.findall(".//svg") for each in document.iter("details")}
    assert len(of_models["chat"]) > 12
    assert len(document.findall(".//svg")) > 45
    for figure in document.iter("figure"):
        assert figure.findtext("h4")
        assert figure.findtext("figcaption")
        assert figure.find(".//path") is not None


def test_nothing_in_a_label_becomes_markup_and_nothing_is_fetched(document: etree._Element) -> None:
    assert not list(document.iter("script", "iframe", "link", "img", "object"))
    policy = document.find(".//meta[@http-equiv]")
    assert policy.get("content") == "default-src 'none'; style-src 'unsafe-inline'"
    addresses = [value for each in document.iter() for name, value in each.items() if name.endswith(("href", "src"))]
    assert addresses
    assert all(value.startswith("#") for value in addresses)
    hostile = [text for text in document.itertext() if "<script>alert(1)</script>" in text]
    assert len(hostile) > 3  # in tables, and written in charts
    assert all("\u202e" not in text and "\x07" not in text and "$x$" in text for text in hostile)


def test_a_picture(scene: Scene, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    done = report(scene, "--hours", "0.1", "--output", str(file))
    assert done.returncode == 0, done.stderr
    assert b"Warning" not in done.stderr
    with Image.open(file) as image:
        assert image.format == "PNG"
        assert image.width == 1200
        assert image.height > 1000
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
    drawn = [colour for colour in PALETTE if ImageColor.getrgb(colour) in colours]
    assert len(drawn) >= 3, "a line for each model"
    assert ImageColor.getrgb(Colour.GOOD) in colours, "one that is ready"


def test_to_standard_output(scene: Scene) -> None:
    done = report(scene, "--hours", "0.1", "--output", "any.png", "--stream")
    with Image.open(io.BytesIO(done.stdout)) as image:
        assert image.format == "PNG"


def test_deploy_writes_where_it_was_called(scene: Scene, tmp_path: Path) -> None:
    environ = {**os.environ, "VLLM_UNIFIED_HOME": str(scene.home), "VLLM_API_KEY": API_KEY}
    command = [str(CHECKOUT / "deploy.sh"), "report", "now.png", "--hours", "0.1", "--prometheus"]
    done = subprocess.run([*command, scene.url], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'now.png'}\n"), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["now.png"]
    nowhere = f"http://127.0.0.1:{free_port()}"
    done = subprocess.run([*command, nowhere], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 3
    assert [path.name for path in tmp_path.iterdir()] == ["now.png"]


def test_a_time_of_which_nothing_is_known(scene: Scene) -> None:
    with Prometheus(scene.url, Span(1e9, 1e9 + 3600)) as prometheus:
        seen = history(prometheus, whole=True)
    assert seen.models == []
    assert "No data" in page(seen)
    with Image.open(io.BytesIO(picture(seen))) as image:
        assert image.width == 1200


def test_without_a_prometheus(scene: Scene) -> None:
    done = report(scene, url=f"http://127.0.0.1:{free_port()}")
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 3
    assert line.endswith("COMPOSE_PROFILES=monitoring in .env turns it on, with ./deploy.sh restart")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--output", "day.pdf"], 2, "day.pdf: say FILE.html for a page or FILE.png for a picture"),
        (["--hours", "0"], 2, "0.0 is not in the range"),
        (["--prometheus", "localhost:9090"], 1, "localhost:9090: no address of a Prometheus; use http://HOST:PORT"),
        (["--prometheus", "ROUTER"], 1, "and not as Prometheus does"),
        (["--output", "/no/such/folder/a.png"], 1, "/no/such/folder/a.png"),
    ],
)
def test_errors(scene: Scene, options: list[str], code: int, said: str) -> None:
    router = f"http://127.0.0.1:{scene.router_port}"
    done = report(scene, "--hours", "0.1", *(router if word == "ROUTER" else word for word in options))
    text = done.stderr.decode()
    assert done.returncode == code, text
    assert said in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "s", "0"),
        (0.0342, "s", "34.2 ms"),
        (12.5, "s", "12.5 s"),
        (600, "s", "10 min"),
        (86400 * 3, "s", "3 d"),
        (0.873, "percentunit", "87.3 %"),
        (3 << 30, "bytes", "3 GiB"),
        (1234, "short", "1.23k"),
        (999.6, "short", "1,000"),
        (0.05, "reqps", "0.05/s"),
        (-40, "s", "-40 s"),
        (float("nan"), "s", "–"),
        (float("inf"), "s", "∞"),
    ],
)
def test_numbers_as_people_read_them(value: float, unit: str, text: str) -> None:
    assert shown(value, unit) == text
