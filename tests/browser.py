"""A headless Chromium for the tests of pages: found on the machine, never downloaded."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def executable():
    """Path of a Chromium, or None; SEQDGM_BROWSER names one."""
    return os.environ.get("SEQDGM_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def launched():
    """Yield a browser of playwright; skip, with the reason, where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = executable()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} on PATH, nor SEQDGM_BROWSER")
    # A container's root user has no sandbox of its own.
    args = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=args)
        yield browser
        browser.close()


class Visit:
    """A page in a context that lets nothing but the file itself through, and notes what it sees.

    Attributes
    ----------
    page : playwright Page
    requests : list of str
        Addresses asked for besides the file's own.
    complaints : list of str
        Errors and warnings of the console, uncaught errors, dialogs.
    """

    def __init__(self, browser, path, **options):
        self.requests, self.complaints = [], []
        self.context = browser.new_context(**options)
        own = path.resolve().as_uri()

        def only_the_file(route):
            if route.request.url == own:
                route.continue_()
            else:
                self.requests.append(route.request.url)
                route.abort()

        self.context.route("**/*", only_the_file)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._listen)
        self.page.on("dialog", self._refuse)
        self.page.goto(own)
        self.page.wait_for_selector("html[data-ready=true]", timeout=30_000)

    def _listen(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _refuse(self, dialog):
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def close(self):
        self.context.close()
