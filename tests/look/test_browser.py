"""The widgets in a real browser: JupyterLab and headless Chromium, started here; pointer and keys as a person uses them.

`make test-browser` runs these (pytest -m browser). Screenshots go to the folder SPML_SCREENSHOTS, or to pytest's.
"""
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from spml_kit.files import read_index_png
from spml_kit.infer.bundle import load_model
from spml_kit.data.weak import WeakSet
from spml_kit.data.images import folder_sets
from spml_kit.data.formats import read_annotation

pytestmark = pytest.mark.browser
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --window-size=1280,1500""".split()
ROOT = Path(__file__).parents[2]


def find(*names):
    return next((p for p in map(shutil.which, names) if p), None)


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    "Folder of the screenshots"
    folder = Path(os.environ.get("SPML_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    "Headless Chromium"
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install 'spml_kit[browser]'")
    chromium, chromedriver = find("chromium", "chromium-browser", "google-chrome"), find("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("no Chromium with its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", dict(enabled=True)) # JupyterLab's current widget is the one with the focus
    yield driver
    driver.quit()


class Lab:
    "JupyterLab on a folder of its own, seen by a browser"

    def __init__(self, driver, home, shots):
        self.driver, self.root, self.shots, self.token = driver, home / "notebooks", shots, secrets.token_hex(16)
        self.root.mkdir()
        quiet = home / "settings_dir" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
        quiet.parent.mkdir(parents=True)
        quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{s.getsockname()[1]}"
        env = os.environ | {f"JUPYTER_{k}": str(home / k.lower()) for k in ("CONFIG_DIR", "RUNTIME_DIR")} | {
            f"JUPYTERLAB_{k}": str(home / k.lower()) for k in ("SETTINGS_DIR", "WORKSPACES_DIR")} | dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", PYTHONWARNINGS="ignore::FutureWarning", IPYTHONDIR=str(home / "ipython"))
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={self.url.rsplit(':')[-1]}", "--ServerApp.port_retries=0",
                   f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={self.root}", "--LabApp.expose_app_in_browser=True"]
        self.log = home / "lab.log"
        self.process = subprocess.Popen(command, env=env, stdout=self.log.open("w"), stderr=subprocess.STDOUT, start_new_session=True)
        self.wait(self.answers, "JupyterLab does not answer", 60)

    def answers(self):
        assert self.process.poll() is None, f"JupyterLab ended:\n{self.log.read_text()}"
        try:
            return urllib.request.urlopen(f"{self.url}/api/status?token={self.token}", timeout=5).status == 200
        except OSError:
            return False

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(20)

    def wait(self, condition, otherwise, seconds=60):
        "What `condition` returns, once it is true"
        from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait
        try:
            return WebDriverWait(self.driver, seconds, .1, ignored_exceptions=[StaleElementReferenceException]).until(lambda _: condition())
        except TimeoutException:
            self.picture("timeout")
            messages = [m["message"] for m in self.driver.get_log("browser")][-5:]
            raise AssertionError(f"{otherwise} (after {seconds} s; the page said: {messages}; its outputs: {self.outputs()})") from None

    def js(self, code, *args): return self.driver.execute_script(code, *args)

    def all(self, selector): return self.driver.find_elements("css selector", selector)

    def one(self, selector): return self.wait(lambda: next(iter(self.all(selector)), None), f"nothing on the page is {selector}")

    def outputs(self): return " | ".join(e.text for e in self.all(".jp-OutputArea-output"))[-1500:]

    def picture(self, name): self.driver.save_screenshot(str(self.shots / f"{name}.png"))

    def open(self, name, *sources):
        "Open a notebook of these cells"
        nb = new_notebook(cells=[new_code_cell(s) for s in sources], metadata={"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}})
        return self.open_notebook(name, nb)

    def open_notebook(self, name, nb):
        nbformat.write(nb, self.root / f"{name}.ipynb")
        self.driver.get(f"{self.url}/lab/tree/{name}.ipynb?token={self.token}&reset")
        idle = "const w = window.jupyterapp?.shell?.currentWidget; return w?.context?.path == arguments[0] && w.sessionContext?.session?.kernel?.status == 'idle'"
        self.wait(lambda: self.js(idle, f"{name}.ipynb"), f"{name}: no kernel", 180)

    def run(self):
        "Run all cells, without waiting for them"
        self.js("window.jupyterapp.commands.execute('notebook:run-all-cells')")

    def done(self): return all(e.text.strip("[]: ").isdigit() for e in self.all(".jp-CodeCell .jp-InputArea-prompt"))

    def no_error(self):
        errors = [e.text for e in self.all("[data-mime-type='application/vnd.jupyter.stderr']") if "Traceback (most recent call last)" in e.text]
        assert errors == [], errors
        return True


@pytest.fixture(scope="module")
def lab(driver, tmp_path_factory, shots):
    lab = Lab(driver, tmp_path_factory.mktemp("lab"), shots)
    yield lab
    lab.close()


def drag(lab, element, points, pen="mouse"):
    "Press, move and release the pointer; points are shares of the element's width and height"
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.pointer_input import PointerInput
    lab.js("arguments[0].scrollIntoView({block: 'center'})", element)
    w, h = (element.size[k] for k in ("width", "height"))
    chain = ActionChains(lab.driver, duration=30, devices=[PointerInput(pen, pen)])
    pointer = chain.w3c_actions.pointer_action
    for i, (x, y) in enumerate(points):
        pointer.move_to(element, int((x - .5) * w), int((y - .5) * h))
        if i == 0:
            pointer.pointer_down()
    pointer.pointer_up()
    chain.perform()


def press(lab, *keys):
    from selenium.webdriver.common.action_chains import ActionChains
    ActionChains(lab.driver).send_keys(*keys).perform()


def chord(lab, *keys):
    from selenium.webdriver.common.action_chains import ActionChains
    chain = ActionChains(lab.driver)
    for k in keys[:-1]: chain.key_down(k)
    chain.send_keys(keys[-1])
    for k in keys[:-1]: chain.key_up(k)
    chain.perform()


def tutorial(name, before=None):
    "A tutorial without its outputs; only the cells before the first one that holds `before`"
    nb = nbformat.read(ROOT / "nbs" / "tutorials" / f"{name}.ipynb", 4)
    end = next((i for i, c in enumerate(nb.cells) if before and before in c.source), len(nb.cells))
    nb.cells = nb.cells[:end]
    for c in nb.cells:
        if c.cell_type == "code": c.outputs = []
    return nb


# the annotator

def test_annotator(lab):
    "The tutorial up to its first strokes; the next ones are drawn by hand"
    from selenium.webdriver.common.keys import Keys
    nb = tutorial("your_own_images", before="def hand")
    nb.cells.append(new_code_cell("Path('root.txt').write_text(str(root)); a.preview = True"))
    lab.open_notebook("annotate", nb)
    lab.run()
    lab.wait(lambda: lab.no_error() and (lab.root / "root.txt").exists(), "the tutorial does not run", 90)
    root = Path((lab.root / "root.txt").read_text())
    canvas, one = lab.one(".spml-annotate canvas"), lab.one
    lab.wait(lambda: canvas.size["width"] > 300, "no image")
    png, strokes, dots, boxes = (root / k / f"photo_00.{e}" for k, e in (("labels", "png"), ("scribbles", "json"), ("points", "json"), ("boxes", "json")))
    n, pixels = len(read_annotation(strokes)), (read_index_png(png) == 1).sum()
    lab.wait(lambda: one("[data-do=preview]").get_attribute("aria-pressed") == "true", "Python's preview is not on the page")

    drag(lab, canvas, [(.3, .7), (.4, .75), (.5, .7)])
    lab.wait(lambda: len(read_annotation(strokes)) == n + 1, "the stroke was not saved")
    lab.wait(lambda: (read_index_png(png) == 1).sum() > pixels, "the label map was not saved")
    said = read_annotation(strokes)
    assert said.classes[-1] == 1
    np.testing.assert_allclose(said.strokes[-1][[0, -1]], [[37.9, 89.1], [63.5, 89.1]], atol=1.5)
    lab.wait(lambda: "saved: labels/photo_00.png" in one(".spml-annotate .status").text, "the page does not say that it was saved")

    cells = len(lab.all(".jp-Cell"))
    press(lab, "0", "b") # background, box tool; in JupyterLab b inserts a cell
    assert len(lab.all(".jp-Cell")) == cells
    assert one("[data-class='0']").get_attribute("aria-pressed") == "true"
    press(lab, "s")
    drag(lab, canvas, [(.1, .9), (.9, .9)], pen="touch")
    lab.wait(lambda: len(read_annotation(strokes)) == n + 2, "the finger's stroke was not saved")
    assert read_annotation(strokes).classes.tolist()[-2:] == [1, 0]
    chord(lab, Keys.CONTROL, "z")
    lab.wait(lambda: len(read_annotation(strokes)) == n + 1, "undo did nothing")
    chord(lab, Keys.CONTROL, Keys.SHIFT, "z")
    lab.wait(lambda: len(read_annotation(strokes)) == n + 2, "redo did nothing")

    lab.js("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code: 'import time; time.sleep(2)'})")
    press(lab, "2", "p")
    drag(lab, canvas, [(.7, .2)]) # while a cell runs
    press(lab, "b")
    drag(lab, canvas, [(.25, .25), (.625, .5)])
    lab.wait(lambda: dots.exists() and boxes.exists(), "the dot and the box were not saved")
    assert read_annotation(dots).classes.tolist() == [2]
    assert read_annotation(boxes).boxes.tolist() == [[32, 32, 80, 64]]
    lab.wait(lambda: one(".spml-annotate").get_attribute("data-waiting") == "0", "Python does not answer")
    lab.picture("annotate")

    press(lab, "e")
    drag(lab, canvas, [(.25, .35)])
    lab.wait(lambda: not boxes.exists(), "the box was not erased")
    press(lab, Keys.ARROW_RIGHT)
    lab.wait(lambda: "photo_01 (2/32)" in one(".spml-annotate .name").text, "no next image")
    one("[data-tag='2']").click()
    lab.wait((root / "labels" / "photo_01.json").exists, "the tag was not saved")
    assert read_annotation(root / "labels" / "photo_01.json").classes.tolist() == [2]
    train, _ = folder_sets(root)
    weak = WeakSet(train, root / "labels")
    assert train.names == ["photo_00", "photo_01"] and weak.sample(0).tags.all() and weak.sample(1).tags.tolist() == [True, False, True, False]
    lab.no_error()


def test_it_learns_while_one_draws(lab):
    "Two strokes by hand, then label map and doubt on the page, accept, the model of them, and the next image"
    code = """from pathlib import Path
from PIL import Image
from spml_kit.data.images import SceneSet
from spml_kit.look.annotate import annotate
root, scenes = Path('learning').absolute(), SceneSet(3, seed=3, size=160)
(root/'images').mkdir(parents=True)
for i in range(3): Image.fromarray(scenes.image(i)).save(root/'images'/f'photo_{i}.png')
a = annotate(root, ['background', 'thing'], learn=True)
a"""
    lab.open("learning", code)
    lab.run()
    canvas, one, root = lab.one(".spml-annotate canvas"), lab.one, lab.root / "learning"
    lab.wait(lambda: canvas.size["width"] > 300 and one(".spml-annotate [data-do=accept]"), "no image", 90)
    ink = lambda: lab.js("const c = arguments[0], d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let s = 0; for (let i = 0; i < d.length; i += 97) s = (s*31 + d[i]) % 1e9; return s", canvas)
    press_class = lambda c: one(f"[data-class='{c}']").click()
    press_class(0)
    drag(lab, canvas, [(.05, .05), (.4, .05), (.9, .05)])
    press_class(1)
    drag(lab, canvas, [(.4, .5), (.5, .55), (.6, .5)])
    lab.wait(lambda: len(read_annotation(root / "scribbles" / "photo_0.json")) == 2, "the strokes were not saved")
    one("[data-do=accept]").click()
    lab.wait(lambda: "accepted" in one(".spml-annotate .status").text or one("[data-do=accept]").click(), "nothing was learnt", 60)
    assert set(np.unique(read_index_png(root / "accepted" / "photo_0.png"))) <= {0, 1}
    lab.picture("learning_labels")
    before = ink()
    one("[data-do=doubt]").click()
    lab.wait(lambda: ink() != before and one("[data-do=doubt]").get_attribute("aria-pressed") == "true", "doubt is not shown")
    lab.picture("learning_doubt")
    one("[data-do=model]").click()
    lab.wait(lambda: "written: model.spml" in one(".spml-annotate .status").text, "the model was not written")
    assert set(np.unique(load_model(root / "model.spml").predict(root / "images" / "photo_1.png"))) <= {0, 1}
    one("[data-do=doubtful]").click()
    lab.wait(lambda: "(1/3)" not in one(".spml-annotate .name").text, "no next image")
    lab.no_error()


# the explorers

EXPLORERS = dict(relations="clusters per side", background="alpha", regions="regions", retrieval="query", embedding="step") # and a slider of each


def test_explorers(lab):
    "The tutorial: a click in a picture, an arrow key, a slider; what is said and shown changes"
    if not (ROOT / "nbs" / "tutorials" / "explore.ipynb").exists(): pytest.skip("there is no tutorial of the explorers")
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    lab.open_notebook("explore", tutorial("explore"))
    lab.run()
    lab.wait(lambda: lab.no_error() and all(lab.all(f".spml-explore-{name} .spml-picture img") for name in EXPLORERS), "not all explorers are on the page", 300)
    lab.wait(lab.done, "the tutorial does not end", 120)
    for name, control in EXPLORERS.items():
        root = lab.one(f".spml-explore-{name}")
        find, all_of = (lambda css: root.find_element("css selector", css)), (lambda css: root.find_elements("css selector", css))
        state = lambda: (find(".spml-sentence").text, [i.get_attribute("src") for i in all_of(".spml-picture img")])
        image = find(".spml-picture img")
        lab.js("arguments[0].scrollIntoView({block: 'center'})", image)

        before, (w, h) = state(), (image.size[k] for k in ("width", "height"))
        ActionChains(lab.driver).move_to_element_with_offset(image, -w // 4, -h // 4).click().perform()
        clicked = lab.wait(lambda: (now := state())[0] != before[0] and now, f"{name}: a click changes nothing")
        if name == "relations": # says which pixel it was
            x, y = (lab.js(f"return arguments[0].natural{k}", image) // 4 for k in ("Width", "Height"))
            said = [int(v) for v in re.findall(r"\d+", clicked[0])[:3]]
            assert abs(said[0] - x) <= 2 and abs(said[1] - y) <= 2 and said[2] == 0, clicked[0]
        assert image == lab.driver.switch_to.active_element # arrow keys go on from here
        press(lab, Keys.ARROW_RIGHT)
        moved = lab.wait(lambda: (now := state()) != clicked and now, f"{name}: an arrow key changes nothing")

        slider = next(s for s in all_of(".widget-hslider") if s.is_displayed() and s.text.startswith(control))
        handle, readout = slider.find_element("css selector", ".noUi-handle"), slider.find_element("css selector", ".widget-readout")
        value = readout.text
        lab.js("arguments[0].focus()", handle)
        press(lab, *[Keys.ARROW_RIGHT] * 4)
        if readout.text == value: press(lab, *[Keys.ARROW_LEFT] * 4) # it was at its end
        assert readout.text != value
        lab.wait(lambda: state() != moved, f"{name}: the slider changes nothing")
        lab.picture(f"explore_{name}")
    assert len(lab.all(".jp-Notebook")) == 1 and not lab.all(".jp-Dialog")
    lab.no_error()


# the live view of training

TRAIN = """import time; from fastai.callback.core import Callback
from spml_kit.look.live import *; from spml_kit.learn.losses import *
from spml_kit.learn.callbacks import *
from spml_kit.learn.checkpoint import *
from spml_kit.learn.learner import *; from spml_kit.data.batches import *; from spml_kit.data.images import *
from spml_kit.data.weak import *
from spml_kit.data.clicks import *; from spml_kit.method.recipes import *
recipe = RECIPES['small'].but(embed=dict(backbone='test_resnet', pretrained=False), dim=8, grid=(3, 3), iterations=3, crop=64)
dls = weak_dls(WeakSet(SceneSet(8, size=64), 'scribbles', regions=12), SceneSet(2, size=64, start=100), bs=2, crop=64, steps=40)
learn = spml_learner(dls, recipe=recipe, path='run')
live = LiveCB(images=2, every=5)
class SlowCB(Callback):
    def after_batch(self): time.sleep(.1)"""


def test_live_view(lab):
    "Stopped by the button, then by the notebook's interrupt button; each time a run that goes on"
    note = "print('NOTE', live.note, len(learn.history))"
    lab.open("live", TRAIN, *(f"learn.fit_poly(3, {more})\n{note}" for more in ("cbs=[live, SlowCB()]", "resume=True, cbs=[live, SlowCB()]", "resume=True, cbs=live")))
    lab.run()
    said = lambda: [line for e in lab.all(".jp-OutputArea-output") for line in e.text.splitlines() if line.startswith("NOTE")]
    buttons = lambda: [b for b in lab.all("button.jupyter-button") if b.text == "Stop"]
    picture = lambda: [e.get_attribute("src")[-400:] for e in lab.all(".jp-RenderedImage img")]

    lab.wait(buttons, "no button to stop", 60)
    first = lab.wait(picture, "no picture")
    lab.wait(lambda: picture()[-1] != first[-1], "the picture does not change")
    assert said() == []
    lab.picture("live")
    buttons()[0].click()
    lab.wait(lambda: len(said()) == 1, "the button does not stop training")
    assert said()[0].startswith("NOTE stopped in round")

    lab.wait(lambda: len(picture()) == 2 and buttons(), "the second run has no button")
    lab.js("window.jupyterapp.commands.execute('notebook:interrupt-kernel')")
    lab.wait(lambda: len(said()) == 2, "the interrupt does not stop training")
    lab.wait(lambda: len(said()) == 3, "the resumed run does not end", 60)
    assert said()[1].startswith("NOTE stopped in round") and said()[2] == "NOTE 3 rounds done 3"
    assert buttons() == [] # a sentence stands in their place
    lab.no_error()
    lab.picture("live_done")
