"""A headless Chromium, spoken to by its DevTools protocol."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from pathlib import Path

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTH, HEIGHT = 1400, 900
PATIENCE_SECONDS = 180.0


class Browser:
    """One page. Use `with`."""

    def __init__(self, folder: Path):
        """folder: for its profile, thrown away with the test's."""
        assert CHROMIUM, "a test that needs it is skipped without it"
        self.profile = folder / "profile"
        self.command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        self.command += ["--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars"]
        self.command += [f"--user-data-dir={self.profile}", f"--window-size={WIDTH},{HEIGHT}"]
        # As with a mouse: without one, charts show their tools all the time.
        self.command += ["--blink-settings=primaryHoverType=2,availableHoverTypes=2"]
        self.command += ["--remote-debugging-port=0", "about:blank"]
        self.loop, self.calls = asyncio.new_event_loop(), 0

    def __enter__(self) -> "Browser":
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self.loop.run_until_complete(self._connect())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        if session := getattr(self, "session", None):
            self.loop.run_until_complete(session.close())
        self.process.terminate()
        self.process.wait(20)
        self.loop.close()

    async def _connect(self) -> None:
        port_file, deadline = self.profile / "DevToolsActivePort", time.monotonic() + PATIENCE_SECONDS
        while not port_file.exists() or not port_file.read_text().strip():
            assert self.process.poll() is None and time.monotonic() < deadline, "chromium did not start"
            await asyncio.sleep(0.1)
        port = port_file.read_text().split()[0]
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{port}/json") as answer:
            (page, *_) = [each for each in await answer.json() if each["type"] == "page"]
        self.socket = await self.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        # MLflow's assistant opens by itself on a first visit, over a quarter of the page.
        visited = "localStorage['mlflow.assistant.fab.autoOpenedOnFirstLoad_v1'] = 'true'"
        await self._ask("Page.enable", {})
        await self._ask("Page.addScriptToEvaluateOnNewDocument", {"source": f"try {{ {visited} }} catch {{}}"})

    def _call(self, method: str, **params) -> dict:
        """Ask the page, and take the answer to this very question."""
        return self.loop.run_until_complete(asyncio.wait_for(self._ask(method, params), PATIENCE_SECONDS))

    async def _ask(self, method: str, params: dict) -> dict:
        self.calls += 1
        await self.socket.send_json({"id": self.calls, "method": method, "params": params})
        while True:
            message = json.loads((await self.socket.receive()).data)
            if message.get("id") == self.calls:
                assert "error" not in message, message
                return message["result"]

    def open(self, address: str) -> None:
        self._call("Page.navigate", url="about:blank")  # a change behind the # alone would load nothing anew
        self._call("Page.navigate", url=address)

    def run(self, script: str):
        """The value of a JavaScript expression."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    @property
    def text(self) -> str:
        """What a reader sees of the page, with what must be scrolled to."""
        return self.run("document.body ? document.body.innerText : ''") or ""

    def wait_for(self, *texts: str) -> str:
        """Until the page shows all texts."""
        self.wait_until(lambda: all(text in self.text for text in texts), f"expected {texts}")
        return self.text

    def wait_until(self, condition, what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{what}; found:\n{self.text}"
            time.sleep(0.3)

    def click(self, text: str) -> None:
        """On the first button, tab or link with exactly this text."""
        script = f"""(() => {{
            const all = [...document.querySelectorAll('button, a, [role=tab], [role=menuitem], label')];
            const found = all.find(each => each.innerText.trim() === {json.dumps(text)});
            if (found) found.click();
            return Boolean(found);
        }})()"""
        self.wait_until(lambda: self.run(script), f"expected something to click named {text!r}")

    def scroll_to(self, text: str) -> None:
        """Bring what shows exactly this text into sight; charts are drawn only there."""
        script = f"""(() => {{
            const leaves = [...document.querySelectorAll('*')].filter(each => each.children.length === 0).reverse();
            const found = leaves.find(each => each.textContent.trim() === {json.dumps(text)});
            if (found) found.scrollIntoView({{block: 'start'}});
            return Boolean(found);
        }})()"""
        self.wait_until(lambda: self.run(script), f"expected {text!r} to scroll to")

    def has_picture(self, least_px: int = 32) -> bool:
        """Whether a loaded picture is there that is none of the page's own."""
        script = "[...document.images].filter(each => each.src.startsWith('blob:') || each.src.includes('artifact'))"
        return self.run(f"{script}.some(each => each.complete && each.naturalWidth >= {least_px})")

    def screenshot(self, path: Path) -> Path:
        time.sleep(1.0)  # what fades in is there then
        answer = self._call("Page.captureScreenshot", format="png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(answer["data"]))
        return path
