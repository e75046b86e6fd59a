"""How fast the built website's model is in Chromium: milliseconds a picture, seconds to the first one, bytes to fetch.

    make book && .venv/bin/python benchmarks/browser.py

Prints JSON; the limits on medians are those that the book promises. Measure on a machine that does nothing else: where
the median lies far above the fastest, other programs took their share.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import chromium  # noqa: E402

LIMITS = {"decode_ms": 8, "decode_ms_slow": 35, "first_picture_s": 3, "decoder_bytes": 3.2e6}
SLOWDOWN = 4  # of the processor
LATENCY_MS, MEGABITS = 40, 10  # of the connection
DATASETS = ("mnist", "fashion-mnist")
CODES = {  # capsules on: a slider moves one pose a little at every step, a walk and a drawing move several
    "one_capsule": [3],
    "two_capsules": [3, 11],
    "all_capsules": list(range(20)),
}

# Milliseconds of every decode() while the poses of the capsules `on` turn a little at each step.
DECODE = """async ([name, on, count]) => {
    const { loadModel } = await import("/_static/web/engine.js");
    const model = await loadModel("/_static/weights/", name), { mean } = model.manifest.poses;
    const times = [];
    for (let step = 0; step < count + 20; step++) {
        const capsules = new Float32Array(20 * 16);
        for (const j of on) capsules.set(mean[j].map((value, n) => value + 0.1 * Math.sin(step / 10 + n)), 16 * j);
        const start = performance.now();
        model.decode(capsules);
        times.push(performance.now() - start);
        await new Promise((resolve) => setTimeout(resolve)); // a page draws in between
    }
    return times.slice(20); // the browser has compiled the code by then
}"""

# When the first widget of a page was ready: the model is there, its picture drawn, its controls act.
READY = """new MutationObserver(() => {
    if (document.querySelector("[data-ready]")) globalThis.firstPicture ??= performance.now() / 1000;
}).observe(document, { subtree: true, childList: true, attributes: true, attributeFilter: ["data-ready"] });"""


def decode_times(browser, address: str, name: str, on: list[int], slowdown: int, count: int) -> list[float]:
    """Milliseconds of ``count`` pictures, the processor slowed down."""
    page = browser.new_page()
    page.goto(f"{address}genindex.html")
    page.context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": slowdown})
    times = page.evaluate(DECODE, [name, on, count])
    page.close()
    return times


def first_picture(browser, url: str) -> tuple[float, int]:
    """Seconds until the first widget is ready, in an empty browser on a slow connection, and the bytes until then."""
    context = browser.new_context()
    page, fetched = context.new_page(), []
    session = context.new_cdp_session(page)
    session.send("Network.enable")
    session.on("Network.dataReceived", lambda event: fetched.append(event["encodedDataLength"]))
    speed = MEGABITS * 1e6 / 8
    conditions = {"offline": False, "latency": LATENCY_MS, "downloadThroughput": speed, "uploadThroughput": speed}
    session.send("Network.emulateNetworkConditions", conditions)
    page.add_init_script(READY)
    page.goto(url, wait_until="commit")
    page.wait_for_function("globalThis.firstPicture", timeout=60_000)
    result = page.evaluate("globalThis.firstPicture"), sum(fetched)
    context.close()
    return result


def measure(browser, address: str, folder: Path, page: str, count: int, runs: int) -> dict:
    """Every measure, by data set and by what is on."""
    result = {"chromium": browser.version, "decode_ms": {}, "decode_ms_slow": {}, "decoder_bytes": {}}
    for name in DATASETS:
        manifest = json.loads((folder / "_static" / "weights" / f"{name}.json").read_text("utf-8"))
        result["decoder_bytes"][name] = manifest["files"]["decoder"]["bytes"]
        for key, slowdown in (("decode_ms", 1), ("decode_ms_slow", SLOWDOWN)):
            for case, on in CODES.items():
                times = decode_times(browser, address, name, on, slowdown, count)
                result[key][f"{name}, {case}"] = _summary(times)
    firsts = [first_picture(browser, address + page) for _ in range(runs)]
    seconds, fetched = zip(*firsts)
    return result | {"first_picture_s": _summary(seconds), "first_picture_bytes": min(fetched), "limits": LIMITS}


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "fastest": round(min(values), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, default=ROOT / "_build" / "html", help="folder of the built website")
    parser.add_argument("--page", default="book/01-start-here.html", help="page with the first widget")
    parser.add_argument("--count", type=int, default=200, help="pictures for each median")
    parser.add_argument("--runs", type=int, default=5, help="page loads for the median")
    options = parser.parse_args()
    path = chromium.find()
    if path is None or not options.site.is_dir():
        sys.exit(f"This needs one of {', '.join(chromium.NAMES)}, and the website: make book")
    with chromium.launch(path) as browser, chromium.serve(options.site, compress=True) as address:
        result = measure(browser, address, options.site, options.page, options.count, options.runs)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
