"JupyterLab in a headless browser, as readers use it: open a page, run all of its cells."
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip('jupyterlab')
websocket = pytest.importorskip('websocket')  # comes with JupyterLab

ROOT = Path(__file__).resolve().parent.parent
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine needs no proxy
LONGEST = 600  # seconds of a notebook

# the notebook that is open; whether it is ready; run it; what its cells show
PANEL = "[...window.jupyterapp?.shell.widgets('main') ?? []].find(widget => widget.context)"
READY = f"""(() => {{
  const panel = {PANEL}
  const ready = panel?.context.isReady && panel.sessionContext.session?.kernel?.status === 'idle'
  if (ready) window.jupyterapp.shell.activateById(panel.id)
  return ready
}})()"""
RUN = """window.jupyterapp.commands.execute('notebook:run-all-cells').then(
  () => { window.ended = true }, error => { window.ended = String(error) }) && true"""
SHOWN = f"""JSON.stringify({{
  ended: window.ended ?? null,
  cells: {PANEL}.content.widgets.filter(cell => cell.model.type === 'code').map(
    cell => ({{ran: cell.model.executionCount, outputs: cell.model.outputs.toJSON()}}))
}})"""


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def wait_for(find, what, seconds=120):
    "What `find` returns as soon as it is not empty."
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            found = find()
        except (urllib.error.URLError, ConnectionError):
            found = None
        if found:
            return found
        time.sleep(.5)
    pytest.fail(f'{what}: not there after {seconds} s')


def answer(url):
    with LOCAL.open(url, timeout=5) as response:
        return response.read()


class Page:
    "A page of a browser that is told by Chrome's DevTools protocol what to do."
    def __init__(self, port):
        pages = json.loads(answer(f'http://127.0.0.1:{port}/json'))
        url = next(page['webSocketDebuggerUrl'] for page in pages if page['type'] == 'page')
        self.socket = websocket.create_connection(url, timeout=60, suppress_origin=True)
        self.number = 0

    def call(self, method, **params):
        self.number += 1
        self.socket.send(json.dumps(dict(id=self.number, method=method, params=params)))
        while True:
            message = json.loads(self.socket.recv())
            if message.get('id') == self.number:
                return message['result']

    def value(self, script):
        found = self.call('Runtime.evaluate', expression=script, returnByValue=True)
        return found['result'].get('value')


@pytest.fixture(scope='module')
def book(tmp_path_factory):
    "A copy of the book; its tutorial trains for four steps, after which nothing is said about the result."
    root = tmp_path_factory.mktemp('book')
    for folder in ('nbs', 'results'):
        shutil.copytree(ROOT/folder, root/folder, ignore=shutil.ignore_patterns('runs', '.*'))
    tutorial = root/'nbs/tutorials/your_data.ipynb'
    text = tutorial.read_text(encoding='utf-8')
    changes = {"'steps': 100": "'steps': 4", 'n=200': 'n=20', 'if FOLDER is None:': 'if False:'}
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    tutorial.write_text(text, encoding='utf-8')
    return root


@pytest.fixture(scope='module')
def lab(book, tmp_path_factory):
    "The address of a JupyterLab whose folder is a copy of the book."
    root = tmp_path_factory.mktemp('lab')
    names = 'JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTERLAB_SETTINGS_DIR'
    env = os.environ | {name: str(root/name) for name in names} | dict(OMP_NUM_THREADS='1')
    port = free_port()
    options = ['--no-browser', '--allow-root', '--IdentityProvider.token=', '--expose-app-in-browser']
    log = (root/'log').open('w')
    command = [sys.executable, '-m', 'jupyterlab', f'--port={port}', *options]
    process = subprocess.Popen(command, cwd=book, env=env, stdout=log, stderr=log)
    address = f'http://127.0.0.1:{port}'
    wait_for(lambda: answer(f'{address}/api/status'), 'JupyterLab')
    yield address
    process.terminate()
    process.wait(30)


@pytest.fixture
def browser(chromium, tmp_path):
    "The DevTools port of a browser."
    port = free_port()
    process = subprocess.Popen(
        [chromium, '--headless', '--no-sandbox', '--disable-gpu', '--no-proxy-server', 'about:blank',
         f'--user-data-dir={tmp_path}', f'--remote-debugging-port={port}', '--window-size=1280,1000'],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: answer(f'http://127.0.0.1:{port}/json'), 'the browser')
    yield port
    process.terminate()
    process.wait(30)


def run_all(lab, browser, notebook):
    "Everything that the cells of a notebook show while they run, and what stands there in the end."
    page = Page(browser)
    page.call('Emulation.setFocusEmulationEnabled', enabled=True)
    page.call('Page.navigate', url=f'{lab}/lab/tree/nbs/{notebook}?reset')
    wait_for(lambda: page.value(READY), notebook)
    page.value(RUN)
    seen, deadline = '', time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        shown = json.loads(page.value(SHOWN))
        seen += json.dumps(shown['cells'])
        if shown['ended']:
            return shown, seen
        time.sleep(.5)
    pytest.fail(f'{notebook} still runs after {LONGEST} s')


@pytest.mark.parametrize('notebook', [
    'index.ipynb', '14_evaluation.ipynb', 'tutorials/your_data.ipynb',
    pytest.param('13_train.ipynb', marks=pytest.mark.slow)])
def test_a_reader_runs_all_cells(lab, browser, notebook):
    shown, seen = run_all(lab, browser, notebook)
    outputs = [output for cell in shown['cells'] for output in cell['outputs']]
    errors = [output['evalue'] for output in outputs if output['output_type'] == 'error']
    assert not errors
    assert shown['ended'] is True and all(cell['ran'] for cell in shown['cells'])
    assert any('image/png' in output.get('data', {}) for output in outputs)
    assert re.search(r'\d+%\|', seen), 'no progress bar was seen'
