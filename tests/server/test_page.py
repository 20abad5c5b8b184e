"""The page shows what the engine does, in a real browser, and asks nobody but its server."""

import re
import time
import urllib.request
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


def until(browser: Any, expression: str) -> Any:
    end = time.monotonic() + 15
    while not (found := browser.value(expression)):
        assert time.monotonic() < end, expression
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def server(start: Callable[..., Any], fake: ModuleType) -> Any:
    return start(fake.FakeEngine(pace=0.005), name="<b>model</b>", api_key="sesame")


def test_its_policy(server: Any) -> None:
    with urllib.request.urlopen(server.address) as answer:
        page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert re.findall(r'(?:src|href)="(?!data:,")', page) == []
    assert "innerHTML" not in page
    assert " style=" not in page


def test_in_a_real_browser(server: Any, browser: Any) -> None:
    browser.open(server.address, 1200)
    until(browser, "document.getElementById('trouble').textContent.includes('key is wrong or missing')")
    assert browser.complaints  # the browser tells of each 401
    browser.complaints.clear()
    browser.value("document.getElementById('key').value = 'sesame'")
    until(browser, "document.getElementById('slots').textContent === '0 of 4'")
    browser.complaints.clear()
    assert browser.value("document.getElementById('name').textContent") == "<b>model</b>"
    assert browser.value("document.getElementById('format').textContent") == "k4v4"
    assert browser.value("document.getElementById('memory').textContent") == "4 MiB"

    for chat, answer in (("false", "hé <i>you</i>#0"), ("true", "<user>hé <i>you</i>\n<assistant>#0")):
        browser.value(f"document.getElementById('chat').checked = {chat}")
        browser.value("document.getElementById('prompt').value = 'hé <i>you</i>'")
        browser.value("document.getElementById('send').click()")
        until(browser, "document.getElementById('used').textContent.includes('made')")
        assert browser.value("document.getElementById('answer').textContent") == answer
    browser.value("document.getElementById('prompt').value = 'word '.repeat(400)")
    browser.value("document.getElementById('most').value = 2000")
    browser.value("document.getElementById('send').click()")
    until(browser, "document.getElementById('slots').textContent === '1 of 4'")
    until(browser, "parseFloat(document.getElementById('speed').textContent) > 0")
    until(browser, "document.querySelectorAll('#slots-chart path.one')[0].getAttribute('d').includes('L')")
    browser.value("document.getElementById('stop').click()")
    until(browser, "document.getElementById('slots').textContent === '0 of 4'")
    assert server.engine.tickets[-1].cancelled

    assert browser.complaints == []
    assert all(address.startswith((server.address, "data:")) for address in browser.requests)
    for width in (1200, 390):
        browser.open(server.address, width)
        assert browser.value("document.documentElement.scrollWidth <= window.innerWidth")
