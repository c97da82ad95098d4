"The book: the form of notebooks that CONTRIBUTING.md describes, links, and a README that is its notebook."
import ast
import base64
import importlib.util
import json
import re
from configparser import ConfigParser
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def notebooks():
    "All notebooks, except those that are hidden or lie below a name that begins with an underscore."
    paths = [path.relative_to(ROOT) for path in (ROOT/'nbs').rglob('*.ipynb')]
    def hidden(path): return any(part[0] in '._' for part in path.parts)
    return sorted(path for path in paths if not hidden(path))


BOOK = notebooks()
PAGES = [Path(p) for p in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')]
MODULES = sorted((ROOT/'agft').glob('*.py'))
LINK = re.compile(r'\]\((?![a-z]+:|#)([^)#\s]+)')  # a relative link in Markdown, up to its fragment
each_notebook = pytest.mark.parametrize('nb', BOOK, ids=lambda path: path.stem)


class Cell(NamedTuple):
    "A cell of a notebook."
    kind:str      # markdown, code or raw
    source:str
    outputs:list


def cells(nb):
    "The cells of a notebook."
    found = json.loads((ROOT/nb).read_text(encoding='utf-8'))['cells']
    return [Cell(c['cell_type'], ''.join(c['source']), c.get('outputs', [])) for c in found]


def text_of(outputs):
    "The text of a cell's outputs."
    parts = []
    for output in outputs:
        parts.append(output.get('text', ''))
        for kind, value in output.get('data', {}).items():
            if kind.startswith('text'):
                parts.append(value)
    return '\n'.join(''.join(part) for part in parts)  # a part is a text or a list of lines


def settings():
    "The section of settings.ini."
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini')
    return ini['DEFAULT']


def test_readme_is_made_from_the_index():
    spec = importlib.util.spec_from_file_location('readme', ROOT/'tools/readme.py')
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert (ROOT/'README.md').read_text(encoding='utf-8') == tool.readme(), 'run python tools/readme.py'
    in_notebook = '[a](b.ipynb#c) [d](../e) [f](https://g.h) [i](#j)'
    assert tool.from_root(in_notebook) == '[a](nbs/b.ipynb#c) [d](e) [f](https://g.h) [i](#j)'


@each_notebook
def test_begins_with_title_and_summary(nb):
    first = cells(nb)[0]
    lines = [line for line in first.source.splitlines() if line.strip()]
    assert first.kind == 'markdown'
    assert lines[0].startswith('# ') and lines[1].startswith('> ')
    assert sum(line.startswith('> ') for line in lines) == 1


@each_notebook
def test_links_lead_somewhere(nb):
    for cell in cells(nb):
        if cell.kind != 'markdown':
            continue
        for link in LINK.findall(cell.source):
            assert (ROOT/nb.parent/link).exists(), link


@pytest.mark.parametrize('page', PAGES, ids=str)
def test_links_of_pages_lead_somewhere(page):
    for link in LINK.findall((ROOT/page).read_text(encoding='utf-8')):
        assert (ROOT/link).exists(), link


@each_notebook
def test_figures_are_small_and_have_captions(nb):
    book = [cell for cell in cells(nb) if not cell.source.startswith('#| hide')]
    following = [*book[1:], Cell('', '', [])]
    for cell, below in zip(book, following, strict=True):
        data = [output.get('data', {}) for output in cell.outputs]
        pngs = [''.join(d['image/png']) for d in data if 'image/png' in d]
        end = cell.source[-120:]
        if pngs:
            caption = below.kind == 'markdown' and re.match(r'[*_]\S', below.source)
            assert caption, f'no caption in italics under the figure of: {end}'
        for png in pngs:
            assert len(base64.b64decode(png)) < 100_000, end


@each_notebook
def test_no_cell_failed_or_warned(nb):
    for cell in cells(nb):
        failed = [output for output in cell.outputs if output['output_type'] == 'error']
        assert not failed, cell.source
        assert 'Warning' not in text_of(cell.outputs), cell.source


@each_notebook
def test_flags_only_on_cells_that_are_not_exported(nb):
    flags = set(settings()['tst_flags'].split())
    for cell in cells(nb):
        marks = set(re.findall(r'^#\|\s*(\w+)', cell.source, re.M))
        exported = marks & {'export', 'exports', 'exporti'}
        assert not (exported and marks & flags), cell.source


CHAPTERS = [path for path in BOOK if path.stem != 'index']
CALLS = 'style()', 'import_torchvision()'  # what may stand between imports


@pytest.mark.parametrize('nb', CHAPTERS, ids=lambda path: path.stem)
def test_imports_have_cells_of_their_own(nb):
    """nbdev executes every cell with an import when it makes the site.

    The cells that such a cell builds on are not executed.
    """
    for cell in cells(nb):
        if cell.kind != 'code' or re.match(r'#\|\s*export', cell.source):
            continue
        without_magics = re.sub(r'^\s*[%!].*$', '', cell.source, flags=re.M)
        nodes = [node for node in ast.parse(without_magics).body if ast.unparse(node) not in CALLS]
        imports = [isinstance(node, ast.Import | ast.ImportFrom) for node in nodes]
        assert all(imports) or not any(imports), cell.source[:200]


MACHINE = re.compile(r'(?<![\w.~/])/(home|root|work|opt|tmp|usr|Users|mnt|content)/\w')


def test_no_path_of_a_machine():
    assert MACHINE.search("in '/home/me/x'") and not MACHINE.search('https://a.b/home/x')
    for nb in BOOK:
        for cell in cells(nb):
            found = MACHINE.search(cell.source + '\n' + text_of(cell.outputs))
            assert not found, f'{nb}: {found}'
    pages = [ROOT/page for page in PAGES]
    for file in [*MODULES, *pages, *(ROOT/'results').glob('*.json')]:
        found = MACHINE.search(file.read_text(encoding='utf-8'))
        assert not found, f'{file.name}: {found}'


def leaves(node):
    "Every path in the site's sidebar and navigation."
    if isinstance(node, str):
        return [node]
    if isinstance(node, list):
        return [leaf for part in node for leaf in leaves(part)]
    return leaves(node.get('contents', [])) + leaves(node.get('href', []))


def test_site_lists_every_notebook_and_nothing_else():
    site = yaml.safe_load((ROOT/'_quarto.yml').read_text())
    listed = leaves(site['website']['sidebar'])
    assert sorted(listed) == sorted(path.relative_to('nbs').as_posix() for path in BOOK)
    assert set(leaves(site['website']['navbar']['left'])) <= set(listed)
    numbers = [leaf for leaf in listed if re.match(r'\d\d_', leaf)]
    assert numbers == sorted(numbers)
    for file in (site['format']['html']['css'], *site['metadata-files']):
        assert (ROOT/'nbs'/file).is_file(), file


def test_site_and_settings_agree():
    link = ROOT/'nbs/_quarto.yml'
    assert link.is_symlink() and link.readlink() == Path('../_quarto.yml')
    ini = settings()
    site = yaml.safe_load((ROOT/'nbs/nbdev.yml').read_text())['website']
    shown = site['title'], site['description'], site['repo-url']
    assert shown == (ini['title'], ini['description'], ini['git_url'])
    assert f'__version__ = "{ini["version"]}"' in (ROOT/'agft/__init__.py').read_text()
    assert f'## {ini["version"]}' in (ROOT/'CHANGELOG.md').read_text()


@each_notebook
def test_exported_names_are_documented(nb):
    for cell in cells(nb):
        if not re.match(r'#\|\s*export', cell.source):
            continue
        for node in ast.parse(cell.source).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name[0] == '_':
                continue
            assert ast.get_docstring(node), f'{node.name} has no docstring'


REPLACED = ['[Pp]ictures?', 'load_clip', 'save_clip', 'new_clip', '[Ll]adder']


@pytest.mark.parametrize('word', REPLACED)
def test_words_that_were_replaced_do_not_come_back(word):
    """The captions of the small models say 'a picture of', because they were trained on them.

    A ladder is also a drawn thing.
    """
    pattern = re.compile(rf'\b{word}\b')
    allowed = re.compile(r"picture of|a picture|ladder[ =']|'ladder")
    for nb in BOOK:
        for cell in cells(nb):
            found = pattern.search(allowed.sub('', cell.source))
            assert not found, f'{nb}, {cell.kind} cell: {found}'
