"The page of `agft demo`, `bench`, `eval` and `audit`: what it holds, and how Chromium shows it."
import base64
import io
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from agft.bench_report import bench_page
from agft.cli import main
from agft.evaluation import Flags
from agft.plots import figure, show_attack
from agft.report import (
    Cell,
    Report,
    Table,
    best,
    chance_text,
    difference_tables,
    frame_table,
    method_table,
    model_table,
    outcome,
    pareto,
    task_bars,
    task_table,
    threat_table,
)
from agft.results import MEAN, Results, summarise, table

ROOT = Path(__file__).resolve().parent.parent
HTML = '<script>alert(1)</script><img src=x onerror=alert(2)>"\'&'
TASKS = 'shapes', 'digits', 'letters', 'faces'


def flags(clean, robust):
    "Flags of 40 images, the first of which are classified correctly."
    at = np.arange(40)
    return Flags(at < clean, at < robust, np.zeros(40, bool), np.zeros(40), np.zeros(40, int), np.array(.25))


CORRECT = {'A': (36, 4), 'B': (30, 16), 'C': (24, 24)}  # method -> correct images, clean and attacked


def made(correct=CORRECT, tasks=TASKS, attacks=('pgd20',), left_out=()):
    "Results of several methods with the same flags on every task."
    records = []
    for attack in attacks:
        for method, pair in correct.items():
            runs = [{task: flags(*pair) for task in tasks}]
            records += summarise(method, runs, attack, 'Linf', 4/255, tasks[0], left_out=left_out)
    return Results.from_records(records)


def first_cells(shown): return [row[0].text for row in shown.rows], [row[0].text for row in shown.foot]


# -- tables

def test_a_method_is_a_row_with_clean_robust_and_above_chance():
    shown = method_table(made(left_out=['faces']), 'Accuracy')
    assert first_cells(shown) == (['A', 'B', 'C'], ['chance'])
    assert [cell.value for cell in shown.rows[1][4:]] == pytest.approx([75, 40, 15])
    assert [cell.text for cell in shown.rows[0][4:]] == ['90.0', '10.0', '-15.0']
    for row in shown.rows:
        edges:Any = [(cell.low, cell.value, cell.high) for cell in row[1:]]
        assert edges == [tuple(sorted(edge)) for edge in edges]
    assert shown.note == 'Not in the means: faces.' and method_table(made(), '').note == ''


def test_other_tables_have_the_same_numbers():
    by_task = task_table(made(left_out=['faces']), 'robust', '')
    assert by_task.columns == ['method', 'shapes (source)', 'digits', 'letters', 'faces (not in the means)']
    assert first_cells(by_task) == (['A', 'B', 'C'], ['chance', 'images'])
    by_threat = threat_table(made(attacks=('pgd20', 'cw')), '')
    assert by_threat.columns == ['method', 'clean', 'pgd20 4/255', 'cw 4/255']
    alone = model_table(made({'A': (36, 4)}, attacks=('pgd20', 'cw')), '')
    assert alone.columns[3:6] == ['clean', 'pgd20 4/255 robust', 'pgd20 4/255 above chance']
    assert len(alone.rows) == 4 and first_cells(alone)[1] == [MEAN, 'mean of all']


def test_the_columns_of_numbers_are_known():
    cells = [[Cell('a', 'a'), Cell('1', 1), Cell()], [Cell('b', 'b'), Cell(), Cell()]]
    assert Table('', ['x', 'y', 'z'], cells).numeric() == [False, True, False]
    assert Table('', ['x'], []).numeric() == [False]


def test_downloads_hold_the_table():
    shown = method_table(made(), 'Accuracy, pgd20 4/255')
    files = {file['kind']: file for file in shown.files()}
    assert files['CSV']['name'] == 'accuracy-pgd20-4-255.csv'
    text = {kind: base64.b64decode(file['link'].split(',')[1]).decode() for kind, file in files.items()}
    frame = pd.read_csv(io.StringIO(text['CSV'])).set_index('method')
    assert frame[f'{MEAN} robust']['B'] == 40
    assert frame[f'{MEAN} robust low']['B'] < 40 < frame[f'{MEAN} robust high']['B']
    rows = json.loads(text['JSON'])
    assert rows[1]['method'] == 'B' and rows[1][f'{MEAN} above chance'] == 15
    assert '\\toprule' in text['LaTeX'] and '40.0' in text['LaTeX']


# -- what came out

def test_the_sentence_says_what_the_table_says():
    found = made()
    assert best(found) == 'C' and best(found, 'clean') == 'A'
    assert outcome(found) == (
        'Mean of 3 zero-shot tasks, chance 25.0 %, pgd20 4/255. C has the highest robust accuracy, 60.0 %, '
        '20.0 points more than B. A has the highest clean accuracy, 90.0 %, 15.0 points more than B.')
    assert chance_text(found) == '25.0 % in the zero-shot mean, 25.0 % over the tasks'
    one = outcome(made({'A': (36, 4)}, attacks=('pgd20', 'cw')))
    assert 'clean 90.0 %' in one and '15.0 points below chance) under pgd20 4/255, the strongest of 2' in one
    alone = outcome(made({'A': (36, 4)}, tasks=['shapes']))
    assert alone.startswith('Task shapes, chance 25.0 %: clean 90.0 %')


def test_methods_that_are_equal_are_both_named():
    said = outcome(made({'A': (36, 4), 'B': (30, 4)}))
    assert 'A and B have the highest robust accuracy, 10.0 %.' in said
    assert said.endswith('No method is above chance under attack.')


@pytest.mark.parametrize('method, other, low, high', [('C', 'B', .1, .3), ('B', 'C', -.3, -.1)])
def test_a_paired_difference_is_found_in_both_directions(method, other, low, high):
    found = made()
    row = dict(threat='pgd20 4/255', method=method, other=other, kind='robust', difference=.2, low=low,
               high=high, p=.01)
    found.tables['paired'] = table([row])
    assert '(95 % interval of the paired difference 10.0 to 30.0)' in outcome(found)
    found.tables['paired'] = table([row | dict(low=-.1, high=.3)])
    assert ', which contains 0)' in outcome(found)
    assert difference_tables(found, 'pgd20 4/255')[0].rows[0][1].interval == '-10.0 to 30.0'
    assert difference_tables(found, 'cw 4/255') == difference_tables(made(), 'pgd20 4/255') == []


# -- the page

def whole(name='digits', **about):
    "A page with wide and narrow tables and two figures."
    tasks = ['shapes', name, *(f'task number {i}' for i in range(12))]
    found = made(tasks=tasks, left_out=['task number 3'])
    names = pd.Index([name, 'B'], name='method')
    rates = pd.DataFrame(dict(lr=[1e-3, 2e-4], chosen=[True, False]), index=names)
    tables = [method_table(found, f'Accuracy of {name}'), task_table(found, 'robust', 'Robust'),
              frame_table('Rates', rates)]
    figures = {f'Which is better, {name}?': pareto(found), 'Each task': task_bars(found)}
    facts = dict(command=f'agft demo {name}', threats='pgd20 4/255', inputs=dict(model='0f'), **about)
    return Report(f'agft {name}', 'Three methods.', outcome(found), facts, tables, figures).html()


def parsed(page):
    "Tags and their attributes, as a browser reads them."
    found = []
    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs): found.append((tag, dict(attrs)))
    Reader().feed(page)
    return found


def check_page(page, tables, figures):
    "Everything is there and nothing comes from elsewhere."
    assert page.count('<table') == page.count('<thead') == tables and page.count('<svg') == figures
    assert page.count('download=') == 3*tables and page.count('role="img"') == figures
    assert page.count("querySelectorAll('thead button')") == 1 and '</html>' in page
    assert not re.search('http|@import', re.sub('base64,[^"]*', '', page))
    tags = parsed(page)
    links = {attributes['href'] for _, attributes in tags if 'href' in attributes}
    own = {link for link in links if not link.startswith(('data:', '#'))}
    assert own in ({'results.json'}, {'audit.json'})
    names = {name for _, attributes in tags for name in attributes}
    assert not {'src', 'srcset', 'onclick', 'onerror'} & names
    ids = [attributes['id'] for _, attributes in tags if 'id' in attributes]
    assert len(ids) == len(set(ids)) and {link[1:] for link in links if link[0] == '#'} <= set(ids)
    assert len(page.encode()) < 1_000_000


def test_a_page_stands_alone():
    page = whole(chance='25 %', left_out=['task number 3'])
    check_page(page, 3, 2)
    assert '<pre><code>agft demo digits</code></pre>' in page and 'inputs' not in page
    assert '<dt>not in the means</dt><dd>task number 3</dd>' in page and '95 % interval: ' in page
    assert page.index('pgd20 4/255</dd>') < page.index('<table')


def test_names_are_text_everywhere():
    page = whole(HTML, **{HTML: HTML})
    check_page(page, 3, 2)
    tags = [tag for tag, _ in parsed(page)]
    assert tags.count('script') == 1 and 'img' not in tags and page.count('&lt;script&gt;') > 10
    fig, ax = figure()
    ax.set_title(HTML)
    check_page(Report('t', '', '', {}, [], {HTML: fig}).html(), 0, 1)


def test_photographs_do_not_make_a_page_large():
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(8, 3, 28, 28, generator=generator)
    x = torch.nn.functional.interpolate(small, 224, mode='bicubic').clamp(0, 1)
    x_adv = (x + 4/255*torch.randn(x.shape, generator=generator).sign()).clamp(0, 1)
    figures = {'original': show_attack(x, x_adv), 'tuned': show_attack(x, x_adv)}
    page = Report('t', '', '', {}, [], figures).html()
    assert len(page) < 500_000 and page.count('data:image') == 2*24


def test_the_published_photo_benchmark_fits():
    results = Results.load(ROOT/'results/bench_photo.json')
    page = bench_page(results)
    check_page(page, page.count('<section'), 3)
    assert outcome(results.select(section='main', eps=1/255)) in page.replace('&#39;', "'")


def test_eval_writes_a_page(tmp_path):
    words = ['eval', 'agft-tiny', '--n', '6', '--attacks', 'fgsm,mifgsm', '--tasks', 'digits,size']
    assert main([*words, '--out', str(tmp_path)]) == 0
    page = (tmp_path/'report.html').read_text()
    check_page(page, 1, 2)
    assert 'worst case 4/255 above chance' in page and outcome(Results.load(tmp_path/'results.json')) in page


# -- as Chromium shows it

SCRIPT = '''
frame.onload = () => {
  const page = frame.contentDocument, found = {}
  found.window = frame.contentWindow.innerWidth
  found.page = page.documentElement.scrollWidth
  found.scrolling = [...page.querySelectorAll('section .wide')].map(box => box.scrollWidth > box.clientWidth)
  found.letters = [...page.querySelectorAll('svg text')].map(text => {
    const svg = text.closest('svg')
    const size = parseFloat(frame.contentWindow.getComputedStyle(text).fontSize)
    return size*svg.getBoundingClientRect().width/svg.viewBox.baseVal.width
  })
  const table = page.querySelector('table'), heads = table.tHead.rows[0].cells
  const order = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent)
  const click = column => { heads[column].firstChild.click(); return order() }
  found.order = [order(), click(5), click(5), click(4), click(0), click(0)]
  found.sorted = [...heads].map(head => head.getAttribute('aria-sort'))
  found.last = [...table.rows].at(-1).cells[0].textContent
  const small = page.querySelector('td small')
  const shown = () => frame.contentWindow.getComputedStyle(small).display
  found.intervals = [shown()]
  page.getElementById('intervals').click()
  found.intervals.push(shown())
  document.title = JSON.stringify(found)
}'''

def test_on_a_phone_nothing_slides_and_a_click_sorts(chromium, tmp_path):
    "The page stands in a frame, because Chromium's own windows are 500 pixels wide or wider."
    (tmp_path/'report.html').write_text(whole('digits'*30), encoding='utf-8')
    frame = '<iframe id="frame" src="report.html" style="width:375px;height:800px;border:0"></iframe>'
    text = f'<!doctype html><meta charset="utf-8"><title></title>{frame}<script>{SCRIPT}</script>'
    (tmp_path/'phone.html').write_text(text, encoding='utf-8')
    command = [chromium, '--headless', '--no-sandbox', '--disable-gpu', '--allow-file-access-from-files',
               f'--user-data-dir={tmp_path/"profile"}', '--dump-dom', (tmp_path/'phone.html').as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    title = re.search('<title>(.*?)</title>', done.stdout)
    assert title, done.stderr
    found = json.loads(title[1].replace('&amp;', '&').replace('&lt;', '<').replace('&gt;', '>'))
    assert found['window'] == 375 and found['page'] <= 375
    assert found['scrolling'][:2] == [True, True] and min(found['letters']) >= 9
    assert found['order'] == [[*'ABC'], [*'CBA'], [*'ABC'], [*'ABC'], [*'ABC'], [*'CBA']]
    assert found['sorted'] == ['descending'] + [None]*6 and found['last'] == 'chance'
    assert found['intervals'] == ['none', 'block']
