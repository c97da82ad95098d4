"The book: the form of notebooks that CONTRIBUTING.md describes, links, and a README that is its notebook."
import ast
import base64
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from nbdev.frontmatter import _md2dict

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
            assert ROOT/'nbs' in (ROOT/nb.parent/link).resolve().parents, f'{link} is no page of the site'


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
        svgs = [''.join(d['image/svg+xml']) for d in data if 'image/svg+xml' in d]
        end = cell.source[-120:]
        if pngs or svgs:
            caption = below.kind == 'markdown' and re.match(r'[*_]\S', below.source)
            assert caption, f'no caption in italics under the figure of: {end}'
        for png in pngs:
            assert len(base64.b64decode(png)) < 100_000, end
        for svg in svgs:
            assert len(svg) < 100_000, end


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
    chapters = [leaf[:2] for leaf in listed if re.match(r'\d\d_', leaf)]
    assert chapters[:6] == ['06', '08', '10', '13', '14', '15']  # from the model to results
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
    cited = re.findall(r'Version (\d[\d.]+\d)|version = \{(.+)\}', (ROOT/'README.md').read_text())
    assert [max(pair) for pair in cited] == [ini['version']]*2


def test_changelog_has_its_form():
    "Keep a Changelog: unreleased changes first, then each release with its date, in known sections."
    text = (ROOT/'CHANGELOG.md').read_text()
    first, *releases = re.findall(r'^## (.+)$', text, re.M)
    assert first == '[Unreleased]' and releases[0].startswith(f'[{settings()["version"]}] - ')
    assert all(re.fullmatch(r'\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d', release) for release in releases)
    sections = {'Added', 'Changed', 'Deprecated', 'Removed', 'Fixed', 'Security'}
    assert set(re.findall(r'^### (.+)$', text, re.M)) <= sections
    for name in re.findall(r'^## \[(.+?)\]', text, re.M):
        assert f'\n[{name}]: {settings()["git_url"]}/' in text


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


# -- the site, as far as it can be checked without Quarto

FENCE = re.compile(r'^(```|~~~).*?^\1', re.S | re.M)
HEADING = re.compile(r'^(#+) +(.+?) *$', re.M)


class Heading(NamedTuple):
    "A heading of a page."
    level:int
    text:str


def headings(markdown):
    "The headings of Markdown outside of code."
    return [Heading(len(marks), text) for marks, text in HEADING.findall(FENCE.sub('', markdown))]


def prose(nb):
    "All Markdown of a notebook."
    return '\n\n'.join(cell.source for cell in cells(nb) if cell.kind == 'markdown')


def anchor(text):
    "The identifier that Pandoc gives a heading."
    plain = re.sub(r'\[(.+?)\]\(.*?\)', r'\1', text)
    plain = re.sub(r'[^\w\s.-]', '', plain).strip().lower()
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', plain))


def anchors(nb):
    "What a link into a page can name: its headings, and the functions and classes that are documented there."
    found = {anchor(heading.text) for heading in headings(prose(nb))}
    for cell in cells(nb):
        if re.match(r'#\|\s*export', cell.source):
            found |= {getattr(node, 'name', '').lower() for node in ast.parse(cell.source).body}
    return found


def test_anchors_are_those_of_pandoc():
    assert anchor("How far is the paper's protocol from ours?") == 'how-far-is-the-papers-protocol-from-ours'
    assert anchor('2. `agft eval`: [flags](a.ipynb), twice') == 'agft-eval-flags-twice'
    assert headings('# a\n```sh\n# no\n```\n## b') == [Heading(1, 'a'), Heading(2, 'b')]


@each_notebook
def test_first_cell_becomes_the_front_matter(nb):
    "nbdev makes title and description of the first cell, and drops whatever else it holds."
    front = _md2dict(cells(nb)[0].source)
    assert set(front) == {'title', 'description'}
    assert len([line for line in cells(nb)[0].source.splitlines() if line.strip()]) == 2


def test_titles_differ():
    titles = [headings(cells(nb)[0].source)[0].text.casefold() for nb in BOOK]
    assert len(set(titles)) == len(titles)


@each_notebook
def test_headings_are_in_order(nb):
    levels = [heading.level for heading in headings(prose(nb))]
    assert levels[0] == 1 and levels.count(1) == 1
    for above, below in zip(levels, levels[1:], strict=False):
        assert below <= above + 1, headings(prose(nb))


@each_notebook
def test_links_to_headings_lead_somewhere(nb):
    for target, name in re.findall(r'\]\(([^)#\s:]*)#([^)\s]+)\)', prose(nb)):
        page = (nb.parent/target) if target else nb
        assert page.suffix == '.ipynb' and name in anchors(page), f'{target}#{name}'


@each_notebook
def test_images_have_alt_text(nb):
    assert not re.findall(r'!\[\s*\]\(', prose(nb))
    missing = []
    for cell in cells(nb):
        kinds = {kind for output in cell.outputs for kind in output.get('data', {})}
        shown = kinds & {'image/png', 'image/svg+xml'} and not cell.source.startswith('#| hide')
        if shown and not re.search(r'^#\|\s*fig-alt:\s*"?\w.{20}', cell.source, re.M):
            missing.append(cell.source[-80:])
    assert not missing


def site():
    "The site's settings."
    return yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))


WEBSITE_KEYS = {  # of Quarto 1.7, which refuses others; title, description and more stand in nbdev.yml
    'announcement', 'back-to-top-navigation', 'body-footer', 'body-header', 'bread-crumbs', 'code-links',
    'comments', 'favicon', 'image', 'image-alt', 'margin-footer', 'margin-header', 'navbar', 'open-graph',
    'other-links', 'page-footer', 'page-navigation', 'reader-mode', 'repo-actions', 'repo-subdir', 'search',
    'sidebar', 'twitter-card'}


def test_site_has_what_readers_look_for():
    html, web = site()['format']['html'], site()['website']
    assert set(site()['format']) == {'html'}, 'other formats need keep-md, and fail before Quarto 1.10'
    assert set(web) <= WEBSITE_KEYS
    assert web['page-navigation'] and web['search'] and html['toc']
    assert re.search(r'/katex@\d+\.\d+\.\d+/dist/$', html['html-math-method']['url'])
    assert set(html['theme']) == {'light', 'dark'} and html['respect-user-color-scheme']
    footer = ' '.join(web['page-footer'].values())
    for file in ('LICENSE', 'CITATION.cff', 'CHANGELOG.md'):
        assert f'{settings()["git_url"]}/blob/{settings()["branch"]}/{file}' in footer
        assert (ROOT/file).is_file()


def test_site_has_an_icon_and_a_card():
    web = site()['website']
    assert {web['favicon'], web['image']} == set(site()['project']['resources'])
    assert (ROOT/'nbs'/web['favicon']).stat().st_size < 1000
    card = (ROOT/'nbs'/web['image']).read_bytes()
    assert card[:8] == b'\x89PNG\r\n\x1a\n' and len(card) < 100_000
    assert (int.from_bytes(card[16:20], 'big'), int.from_bytes(card[20:24], 'big')) == (1200, 630)
    assert web['image-alt']


@pytest.mark.parametrize('link', re.findall(r'blob/main/([^)#\s]+)', prose(Path('nbs/index.ipynb'))))
def test_links_into_the_repository_lead_somewhere(link):
    assert (ROOT/link).exists()


def test_page_that_is_not_found_leads_on():
    text = (ROOT/'nbs/404.qmd').read_text(encoding='utf-8')
    links = LINK.findall(text)
    assert links and all((ROOT/'nbs'/link).exists() for link in links)


PROCESS = 'import sys; sys.path.insert(0, sys.argv[1]); from render_site import process; process()'


@pytest.fixture(scope='module')
def processed(tmp_path_factory):
    "What Quarto is given, made by nbdev; Quarto itself is not needed."
    root = tmp_path_factory.mktemp('site')
    for file in ('settings.ini', '_quarto.yml'):
        shutil.copy(ROOT/file, root)
    hidden = shutil.ignore_patterns('runs', '.*', '__pycache__')
    for folder in ('agft', 'nbs'):
        shutil.copytree(ROOT/folder, root/folder, symlinks=True, ignore=hidden)
    env = {**os.environ, 'HOME': str(root), 'PYTHONPATH': str(root)}
    command = [sys.executable, '-c', PROCESS, ROOT/'tools']
    found = subprocess.run(command, cwd=root, env=env, check=True, capture_output=True, text=True)
    assert not found.stderr, found.stderr
    return root/'_proc'


def test_what_stands_beside_the_notebooks_reaches_the_site(processed):
    "nbdev leaves out names with an underscore, such as _metadata.yml, unless it is told otherwise."
    named = [*site()['project']['resources'], site()['format']['html']['css']]
    for file in ('_quarto.yml', 'nbdev.yml', '404.qmd', 'experiments/_metadata.yml', *named):
        assert (processed/file).is_file(), file
    assert yaml.safe_load((ROOT/'nbs/experiments/_metadata.yml').read_text())['code-fold'] is True
    assert 'run: python tools/render_site.py' in (ROOT/'.github/workflows/deploy.yaml').read_text()


def code_lines(source):
    "Lines of code without directives and empty lines."
    return [line for line in source.splitlines() if line.strip() and not line.startswith('#|')]


@pytest.mark.parametrize('nb', CHAPTERS, ids=lambda path: path.stem)
def test_site_shows_the_exported_code_in_the_order_of_the_source(nb, processed):
    shown = [cell.source for cell in cells(processed/nb.relative_to('nbs')) if cell.kind == 'code']
    exported = [code_lines(cell.source) for cell in cells(nb) if re.match(r'#\|\s*export', cell.source)]
    found = [code_lines(source) for source in shown if '#| code-summary' in source]
    assert [lines for lines in found if lines] == [lines for lines in exported if lines]
    for source in shown:
        if len(code_lines(source)) > 30 and 'code-summary' in source:
            assert '#| code-fold: true' in source


def test_links_of_the_site_to_functions_lead_to_them(processed):
    url = settings()['doc_host'] + settings()['doc_baseurl']
    links = set()
    for page in processed.rglob('*.ipynb'):
        links |= set(re.findall(re.escape(url) + r'/([\w/]+)\.html#([\w.]+)\)', prose(page)))
    pages = {page.stem[3:]: prose(page) for page in processed.glob('[0-9]*.ipynb')}
    missing = [(page, name) for page, name in links if f'[]{{#{name}}}' not in pages[page]]
    assert len(links) > 50 and not missing


@pytest.mark.parametrize('nb', BOOK, ids=lambda path: path.stem)
def test_site_shows_no_path_and_no_warning(nb, processed):
    text = (processed/nb.relative_to('nbs')).read_text(encoding='utf-8')
    assert not MACHINE.search(text) and not re.search(r'\w*Warning: ', text)


def luminance(color):
    "The relative luminance of a colour #rrggbb (WCAG 2)."
    parts = [int(color[i:i + 2], 16)/255 for i in (1, 3, 5)]
    linear = [c/12.92 if c <= .04045 else ((c + .055)/1.055)**2.4 for c in parts]
    return .2126*linear[0] + .7152*linear[1] + .0722*linear[2]


def contrast(one, other):
    "The contrast of two colours, from 1 to 21."
    low, high = sorted((luminance(one), luminance(other)))
    return (high + .05)/(low + .05)


def test_contrast_is_that_of_the_standard():
    assert contrast('#000000', '#ffffff') == 21 and round(contrast('#777777', '#ffffff'), 2) == 4.48


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_colours_of_the_site_can_be_read(theme):
    css = (ROOT/'nbs/styles.css').read_text(encoding='utf-8')
    block = re.search(rf'body\.quarto-{theme} \{{(.*?)\}}', css, re.S)
    assert block
    colours = dict(re.findall(r'--agft-([\w-]+): (#[0-9a-f]{6})', block[1]))
    used = set(re.findall(r'var\(--agft-([\w-]+)\)', css))
    assert used <= set(colours)
    for name in ('text', 'quiet', 'link', 'code'):
        assert contrast(colours[name], colours['page']) >= 4.5, name
    assert contrast(colours['code'], colours['code-page']) >= 4.5
    assert contrast(colours['rule'], colours['page']) >= 3


def test_wide_things_scroll():
    css = (ROOT/'nbs/styles.css').read_text(encoding='utf-8')
    scrolling = re.findall(r'^([^{}@/\n]+?) \{[^{}]*overflow-x: auto[^{}]*\}', css, re.M)
    assert {'.katex-display', '.cell-output-display table, main table', '.cell-output pre'} <= set(scrolling)
